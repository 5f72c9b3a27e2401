"""Which class a model folder is loaded as: the one that its config.json names, never a guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from gptq_backend import ConfigError

from .errors import load_errors

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # how their names end


def read_config(path: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """The model's configuration; nobody is asked on the terminal whether its code may run.

    Raises:
        ConfigError: it needs code of its own. GPTQError: it cannot be read.
    """
    with load_errors(path, (Exception,)):  # a config.json of unexpected types makes transformers raise any
        content, _ = PretrainedConfig.get_config_dict(path, **kwargs)
        known = str(content.get("model_type")) in transformers.CONFIG_MAPPING
        own = bool(content.get("auto_map")) and not known
        named = content.get("architectures")
    if own and not trust_remote_code:
        raise _own_code(path, _named(named, path) or "its model")
    with load_errors(path, (Exception,)):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)


def class_of(config: Any, path: str | Path, trust_remote_code: bool = False) -> Any:
    """What loads the model: ``AutoModelForCausalLM`` for a causal language model, else the class in ``architectures``
    or the auto class for it. A configuration without ``architectures`` is an encoder-decoder's if it says so, and else
    a causal language model's, if there is one.

    Raises:
        ConfigError: the class is not available, or belongs to another kind of configuration.
    """
    wanted, causal = _named(getattr(config, "architectures", None), path), causal_class(config)
    if wanted is None:
        return _auto_class_of_kind(config)
    if wanted == causal:
        return AutoModelForCausalLM
    references = getattr(config, "auto_map", None)
    references = references if isinstance(references, dict) else {}
    own = [key for key, value in references.items() if key.startswith("AutoModel") and _ends_in(value, wanted)]
    if own and trust_remote_code:
        return getattr(transformers, own[0])
    if (auto := _auto_class(config, wanted)) is not None:
        return auto
    found = _class_called(wanted)
    if found is None:
        if own:
            raise _own_code(path, wanted)
        raise ConfigError(
            f"config.json of {path} names the class {wanted}, which transformers {transformers.__version__} cannot "
            "import here; install a version that has it, or load the model yourself and pass it instead of its folder"
        )
    if found.config_class is None or not isinstance(config, found.config_class):
        raise ConfigError(
            f"config.json of {path} names the class {wanted}, which does not fit its model_type "
            f"{config.model_type!r}; correct the one that is wrong, or load the model yourself and pass it instead "
            "of its folder"
        )
    return found


def class_to_load(path: str | Path, kwargs: dict[str, Any]) -> Any:
    """As :func:`class_of`, for the arguments of a ``from_pretrained`` to come.

    Old checkpoints spell the class of a causal language model in ways of their own (``LLaMAForCausalLM``): such names
    mean ``AutoModelForCausalLM``.
    """
    trusted = bool(kwargs.get("trust_remote_code"))
    config = kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        config = read_config(path, trusted, **{key: kwargs[key] for key in _OF_THE_HUB if key in kwargs})
    causal = causal_class(config) is not None
    try:
        wanted = _named(getattr(config, "architectures", None), path) or ""
        if causal and wanted.endswith(_LANGUAGE_MODELS):
            return AutoModelForCausalLM
        return class_of(config, path, trusted)
    except ConfigError:
        if not causal:
            raise
        return AutoModelForCausalLM  # as plain from_pretrained would; random weights are refused when it has loaded


def from_pretrained(loader: Any, path: str | Path, **kwargs: Any) -> Any:
    """``loader.from_pretrained``, for an auto class or a model's own."""
    if issubclass(loader, PreTrainedModel):
        kwargs.pop("trust_remote_code", None)
    return loader.from_pretrained(path, **kwargs)


def from_config(loader: Any, config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with random weights, of an auto class or a model's own."""
    if issubclass(loader, PreTrainedModel):
        return loader._from_config(config)
    return loader.from_config(config, trust_remote_code=trust_remote_code)


def causal_class(config: Any) -> str | None:
    """Name of the causal language model that transformers has for such a configuration."""
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return None if found is None else found.__name__


def predicts_next_token(config: Any, path: str | Path) -> bool:
    """Whether perplexity, and the divergence of predictions, mean anything for the model of a configuration."""
    wanted, causal = _named(getattr(config, "architectures", None), path), causal_class(config)
    if wanted is None or wanted == causal or wanted.endswith(_LANGUAGE_MODELS):
        return True
    found = _class_called(wanted)
    return found is not None and found.can_generate() and not getattr(config, "is_encoder_decoder", False)


def _auto_class_of_kind(config: Any) -> Any:
    """What a model without a name of its class is, by its configuration."""
    both = [transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq]
    kinds = [AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    kinds = both + kinds if getattr(config, "is_encoder_decoder", False) else kinds
    return next((kind for kind in kinds if type(config) in kind._model_mapping), AutoModelForCausalLM)


def _auto_class(config: Any, wanted: str) -> Any:
    """The auto class of transformers that loads such a configuration as the class of that name; None if none does."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        try:
            found = None if mapping is None else mapping.get(type(config), None)
        except ImportError:  # of a package that its file needs
            continue
        if any(each.__name__ == wanted for each in (found if isinstance(found, tuple) else [found]) if each):
            return auto
    return None


def _class_called(name: str) -> type[PreTrainedModel] | None:
    try:
        found = getattr(transformers, name, None)
    except ImportError:  # of a package that its file needs
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _named(architectures: Any, path: str | Path) -> str | None:
    """The class in ``architectures``, if any."""
    if not architectures:
        return None
    if isinstance(architectures, list | tuple) and isinstance(architectures[0], str):
        return architectures[0]
    raise ConfigError(f"config.json of {path} has architectures={architectures!r}; expected a list with a class name")


def _ends_in(reference: Any, name: str) -> bool:
    """Whether an entry of ``auto_map``, like ``modeling_x.XForCausalLM``, is the class of that name."""
    return isinstance(reference, str) and reference.rpartition(".")[2] == name


def _own_code(path: str | Path, name: str) -> ConfigError:
    return ConfigError(
        f"{path} needs code that comes with it ({name}) and would run on this machine; read that code, then pass "
        "trust_remote_code=True (--trust-remote-code on the command line)"
    )
