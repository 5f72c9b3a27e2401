"""Dense tensors with NaN or infinite values are found when a model is loaded, not in its output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError, QuantLinear
from gptq_backend.format import Manifest, read_tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(model: nn.Module, manifest: Manifest) -> None:
    """Refuse parameters that are not finite; the layers that are quantized check theirs.

    Buffers may be: masks hold minus infinity on purpose. Nothing is known of what is offloaded. Costs about a twentieth
    of reading the tensors, and no memory.

    Args:
        manifest: the checkpoint's tensors by the model's names.

    Raises:
        CheckpointError: with the tensor and its file.
        ConfigError: a value of the file is too large for the dtype that the model is loaded in.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not _is_finite(parameter):
                _refuse(name, parameter, manifest)


def check_stored(names: Iterable[str], manifest: Manifest) -> None:
    """As :func:`check_finite`, for tensors that are read from the files one at a time.

    Args:
        names: of the model's dense parameters.
        manifest: the checkpoint's tensors by the model's names.

    Raises:
        CheckpointError: with the tensor and its file.
    """
    for name in names:
        if name in manifest and manifest[name].dtype in _DTYPES:
            tensor = read_tensor(manifest[name])
            if not _is_finite(tensor):
                _refuse(name, tensor, manifest)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.dtype not in _DTYPES or not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # NaN if any is; isfinite() takes twenty times as long
    return bool(extremes.isfinite().all())


def _refuse(name: str, parameter: Tensor, manifest: Manifest) -> None:
    count = int((~parameter.detach().isfinite()).sum())
    info = manifest.get(name)
    if info is not None and parameter.dtype != info.dtype and _is_finite(read_tensor(info)):
        raise ConfigError(
            f"{name}: {count} of its values are too large for {parameter.dtype} (the checkpoint has {info.dtype}); "
            "load the model with dtype=torch.bfloat16 or torch.float32"
        )
    where = "" if info is None else f" in {info.file.path.name}"
    raise CheckpointError(f"{name}: {count} values{where} are NaN or infinite; the file is damaged, fetch it again")
