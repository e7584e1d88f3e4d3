"""gptfast: open language models as fast as the machine allows, in plain PyTorch.

from gptfast import LLM, SamplingParams
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.config import ModelConfig as ModelConfig
    from gptfast.engine import Engine as Engine
    from gptfast.llm import LLM as LLM
    from gptfast.llm import Chunk as Chunk
    from gptfast.llm import Output as Output
    from gptfast.loading import load as load
    from gptfast.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

# Imported when first used, so that `gptfast --help` need not wait for torch.
_HOMES = {
    "LLM": "gptfast.llm",
    "Chunk": "gptfast.llm",
    "Output": "gptfast.llm",
    "SamplingParams": "gptfast.sampling",
    "ModelConfig": "gptfast.config",
    "Engine": "gptfast.engine",
    "load": "gptfast.loading",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptfast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
