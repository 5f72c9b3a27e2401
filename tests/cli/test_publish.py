"""The card of a checkpoint, and the checkpoint on a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from huggingface_hub import ModelCard

from tests.cli.command import SMALL, TEXT, run
from tests.cli.hub import Hub, hub


def quantize(server: Hub, original: Path, out: Path, repo: str, token: str = "hf_right") -> subprocess.CompletedProcess:
    """The command in a process of its own: the client reads its settings once."""
    settings = {"HF_ENDPOINT": server.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "gptq_cli", "quantize", original, out, *SMALL, "--calibration", TEXT]
    command += ["--quality", "fast", "--push-to", repo]
    return subprocess.run(
        [str(part) for part in command], env=os.environ | settings, capture_output=True, text=True, timeout=250
    )


def test_a_checkpoint_is_uploaded_with_its_card_and_without_paths_of_this_machine(
    original: Path, tmp_path: Path
) -> None:
    with hub() as server:
        done = quantize(server, original, tmp_path / "out", "tiny-gptq")
        assert done.returncode == 0, done.stderr
        assert f"uploaded: {server.address}/somebody/tiny-gptq" in done.stderr
    files = server.repositories["somebody/tiny-gptq"]
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert here.keys() - files.keys() == {"quantize_report.json"}
    assert all(files[name] == here[name] for name in files if name != ".gitattributes")
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert not any(str(original.parent).encode() in content for content in files.values())
    assert 'AutoModelForCausalLM.from_pretrained("somebody/tiny-gptq")' in files["README.md"].decode()


def test_a_repository_that_refuses_leaves_the_checkpoint_and_says_how_to_go_on(original: Path, tmp_path: Path) -> None:
    with hub(refuse_commits=True) as server:
        done = quantize(server, original, tmp_path / "out", "somebody/tiny-gptq")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: the checkpoint in {tmp_path / 'out'} is complete, but it could not be uploaded (")
    assert f"hf upload somebody/tiny-gptq {tmp_path / 'out'} . --exclude quantize_report.json" in line
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("repo", "token"), [("somebody/tiny", "hf_wrong"), ("a/b/c", "hf_right")])
def test_who_may_not_upload_learns_it_before_the_work(repo: str, token: str, original: Path, tmp_path: Path) -> None:
    with hub() as server:
        done = quantize(server, original, tmp_path / "out", repo, token)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --push-to {repo}: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_card_tells_what_was_measured_and_keeps_the_originals_licence(quantized: Path, tmp_path: Path) -> None:
    card = ModelCard.load(quantized / "README.md")
    report = json.loads((quantized / "quantize_report.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["gptq", "4-bit"]
    assert card.data.get("base_model") is None  # a folder of this machine
    assert f"{report['evaluation']['windows']} windows of 32 tokens" in card.text
    assert '"checkpoint_format": "gptq"' in card.text
    assert "vllm serve" in card.text


def test_the_command_in_a_card_loads_the_checkpoint(original: Path, tmp_path: Path) -> None:
    original_card = original / "README.md"
    original_card.write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Something\n")
    try:
        result = run("quantize", original, tmp_path / "out", *SMALL, "--rtn")
    finally:
        original_card.unlink()
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    code = card.text.split("```python\n")[1].split("```")[0].replace('("out"', f'("{tmp_path / "out"}"')
    found: dict = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    assert found["tokenizer"]("a")["input_ids"]
