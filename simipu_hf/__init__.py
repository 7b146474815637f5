"""SimIPU pre-training the Hugging Face way.

    >>> from simipu_hf import load_image_encoder
    >>> encoder, data_config = load_image_encoder("OUT", features_only=True)

Importing this package registers SimIPU with transformers' Auto classes, before or after transformers is imported, so
that `AutoModel.from_pretrained(folder)` finds it without `trust_remote_code`. Nothing heavy is imported for that.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from .version import __version__

# An uninstalled checkout keeps `modeling/` and `dataset_scripts/` beside this package instead of inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "modeling" / "modeling_simipu.py").is_file():
    __path__.append(str(_checkout))

if TYPE_CHECKING:  # "as": for type checkers, which do not compute __all__
    from .hub.sources import load_image_encoder as load_image_encoder
    from .modeling.configuration_simipu import SimIPUConfig as SimIPUConfig
    from .modeling.configuration_simipu import SimIPUDepthConfig as SimIPUDepthConfig
    from .modeling.configuration_simipu import SimIPUDetectionConfig as SimIPUDetectionConfig
    from .modeling.feature_extraction_simipu import SimIPUFeatureExtractor as SimIPUFeatureExtractor
    from .modeling.image_processing_simipu import SimIPUImageProcessor as SimIPUImageProcessor
    from .modeling.modeling_simipu import SimIPUForPreTraining as SimIPUForPreTraining
    from .modeling.modeling_simipu import SimIPUModel as SimIPUModel
    from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation as SimIPUForDepthEstimation
    from .modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection as SimIPUForMonocular3DDetection
    from .modeling.processing_simipu import SimIPUProcessor as SimIPUProcessor

_MODULES = {
    "SimIPUConfig": "modeling.configuration_simipu",
    "SimIPUDepthConfig": "modeling.configuration_simipu",
    "SimIPUDetectionConfig": "modeling.configuration_simipu",
    "SimIPUFeatureExtractor": "modeling.feature_extraction_simipu",
    "SimIPUForDepthEstimation": "modeling.modeling_simipu_depth",
    "SimIPUForMonocular3DDetection": "modeling.modeling_simipu_detection",
    "SimIPUForPreTraining": "modeling.modeling_simipu",
    "SimIPUImageProcessor": "modeling.image_processing_simipu",
    "SimIPUModel": "modeling.modeling_simipu",
    "SimIPUProcessor": "modeling.processing_simipu",
    "load_image_encoder": "hub.sources",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_ours: Any = sys.modules[__name__]  # whose names are imported when a hook asks for them


# One hook for each module of transformers, importing no more than it registers: these modules import each other.
@when_imported("transformers.models.auto.configuration_auto")
def _register_configurations(auto: Any) -> None:
    for config in (_ours.SimIPUConfig, _ours.SimIPUDepthConfig, _ours.SimIPUDetectionConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


@when_imported("transformers.models.auto.feature_extraction_auto")
def _register_feature_extractor(auto: Any) -> None:
    auto.AutoFeatureExtractor.register(_ours.SimIPUConfig, _ours.SimIPUFeatureExtractor, exist_ok=True)


@when_imported("transformers.models.auto.image_processing_auto")
def _register_image_processor(auto: Any) -> None:
    classes = {"torchvision": _ours.SimIPUImageProcessor}
    for config in (_ours.SimIPUConfig, _ours.SimIPUDepthConfig, _ours.SimIPUDetectionConfig):
        auto.AutoImageProcessor.register(config, image_processor_classes=classes, exist_ok=True)


@when_imported("transformers.models.auto.video_processing_auto")
def _register_no_video_processor(auto: Any) -> None:
    """Or `pipeline` guesses the name of one from the image processor's, and asks whether it may run its code."""
    for config in (_ours.SimIPUConfig, _ours.SimIPUDepthConfig, _ours.SimIPUDetectionConfig):
        auto.VIDEO_PROCESSOR_MAPPING.register(config, {}, exist_ok=True)


@when_imported("transformers.models.auto.processing_auto")
def _register_processor(auto: Any) -> None:
    auto.AutoProcessor.register(_ours.SimIPUConfig, _ours.SimIPUProcessor, exist_ok=True)


@when_imported("transformers.models.auto.modeling_auto")
def _register_models(auto: Any) -> None:
    auto.AutoModel.register(_ours.SimIPUConfig, _ours.SimIPUModel, exist_ok=True)
    auto.AutoModel.register(_ours.SimIPUDetectionConfig, _ours.SimIPUForMonocular3DDetection, exist_ok=True)
    auto.AutoModelForPreTraining.register(_ours.SimIPUConfig, _ours.SimIPUForPreTraining, exist_ok=True)
    auto.AutoModelForDepthEstimation.register(_ours.SimIPUDepthConfig, _ours.SimIPUForDepthEstimation, exist_ok=True)
