"""``vllm serve FOLDER --quantization gptq`` on loopback, driven by the ``openai`` client; and what must not stop it."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.transformers.checkpoints import PEERS
from tests.vllm.engine import EngineError, Server
from tests.vllm.test_offline import BOUND

NAME = "llama-4-64-actorder"  # stock vLLM refuses it
LENGTH = 128
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    arguments = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", str(LENGTH), "--max-logprobs", "300"]
    arguments += ["--chat-template", str(folder / "template.jinja")]
    server = Server(PEERS / NAME, folder / "log.txt", cache, arguments)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.url, api_key="none", timeout=120)


def test_the_log_says_once_who_serves(server: Server) -> None:
    log = server.log.read_text()
    assert log.count("gptq-backend serves this checkpoint of GPTQ: --quantization gptq asks for it") == 1


def test_a_completion_has_the_logprobs_of_the_checkpoint(client: Any) -> None:
    expected = load_file(PEERS / f"{NAME}.expected.safetensors")
    ids = expected["input_ids"][0].tolist()
    answer = client.completions.create(model="model", prompt=ids, max_tokens=1, echo=True, logprobs=0, temperature=0)
    found = torch.tensor(answer.choices[0].logprobs.token_logprobs[1 : len(ids)])
    wanted = expected["logits"][0].float().log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (found - wanted).abs().mean() < BOUND


def test_chat_answers_with_logprobs(client: Any) -> None:
    messages = [{"role": "user", "content": "The tower of"}]
    answer = client.chat.completions.create(
        model="model", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert 1 <= len(content) <= 8
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob for entry in content)


def test_a_stream_adds_up_to_the_whole(client: Any) -> None:
    wanted = {"model": "model", "prompt": "The tower of", "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**wanted).choices[0].text
    assert "".join(part.choices[0].text for part in client.completions.create(**wanted, stream=True)) == whole
    chat = {"model": "model", "messages": [{"role": "user", "content": "The tower of"}], "max_tokens": 8}
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**chat, stream=True)]
    assert len(parts) > 1


def _complete(client: Any, i: int, tokens: int = 12) -> str:
    prompt = list(range(3 + i % 40, 20 + i % 40))
    options = {"max_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True}, "logprobs": 1}
    return client.completions.create(model="model", prompt=prompt, **options).choices[0].logprobs.tokens


def test_sixteen_requests_at_once_keep_their_sequences_apart(client: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: _complete(client, i), range(16)))
    assert all(len(tokens) == 12 for tokens in answers)
    assert sum(_complete(client, i) == answers[i] for i in range(4)) >= 3  # a near tie may fall otherwise in a batch


def test_the_server_survives_a_huge_prompt(server: Server, client: Any) -> None:
    import openai

    for prompt in ([5] * 100_000, "word " * 500_000):
        with pytest.raises(openai.BadRequestError, match="context length|maximum"):
            client.completions.create(model="model", prompt=prompt, max_tokens=1)
    assert server.healthy()


def test_the_server_survives_a_killed_client(server: Server, client: Any) -> None:
    body = json.dumps({"model": "model", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True})
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read(10)
        connection.close()
    assert len(_complete(client, 0)) == 12
    assert server.healthy()


def test_the_server_survives_a_burst_of_200_requests(server: Server) -> None:
    import openai

    # Connections of its own: the client and the server both drop an idle one after five seconds, and a request sent
    # at that moment is lost in any client that does not try again.
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda i: _complete(client, i, tokens=1 + i % 32), range(200)))
    assert [len(tokens) for tokens in answers] == [1 + i % 32 for i in range(200)]
    assert server.healthy()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PEERS / NAME, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=r"model\.safetensors, which has \d+ bytes, .*the file is damaged"):
        Server(folder, tmp_path / "log.txt", cache)
