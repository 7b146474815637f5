"""SimIPU pre-training the Hugging Face way.

Importing this package registers SimIPU with transformers' Auto classes, so that
`AutoModel.from_pretrained(folder)` finds it without `trust_remote_code`.
"""

from pathlib import Path

from .version import __version__

# An uninstalled checkout keeps `modeling/` and `dataset_scripts/` beside this package instead of inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "modeling" / "modeling_simipu.py").is_file():
    __path__.append(str(_checkout))

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .hub.image_encoder import load_image_encoder
from .modeling.configuration_simipu import SimIPUConfig
from .modeling.configuration_simipu_depth import SimIPUDepthConfig
from .modeling.modeling_simipu import SimIPUForPreTraining, SimIPUModel
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .modeling.processing_simipu import SimIPUImageProcessor, SimIPUPointCloudProcessor, SimIPUProcessor

AutoConfig.register(SimIPUConfig.model_type, SimIPUConfig, exist_ok=True)
AutoConfig.register(SimIPUDepthConfig.model_type, SimIPUDepthConfig, exist_ok=True)
AutoModel.register(SimIPUConfig, SimIPUModel, exist_ok=True)
AutoModelForPreTraining.register(SimIPUConfig, SimIPUForPreTraining, exist_ok=True)
AutoModelForDepthEstimation.register(SimIPUDepthConfig, SimIPUForDepthEstimation, exist_ok=True)
AutoProcessor.register(SimIPUConfig, SimIPUProcessor, exist_ok=True)
AutoFeatureExtractor.register(SimIPUConfig, SimIPUPointCloudProcessor, exist_ok=True)
for config_class in (SimIPUConfig, SimIPUDepthConfig):
    AutoImageProcessor.register(
        config_class, image_processor_classes={"torchvision": SimIPUImageProcessor}, exist_ok=True
    )

__all__ = [
    "SimIPUConfig",
    "SimIPUDepthConfig",
    "SimIPUForDepthEstimation",
    "SimIPUForPreTraining",
    "SimIPUModel",
    "SimIPUProcessor",
    "__version__",
    "load_image_encoder",
]
