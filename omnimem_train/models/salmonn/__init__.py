"""video-SALMONN 2+ (arXiv 2506.15220), an independent implementation on stock parts. See `model` for the class."""

from omnimem_train.models.salmonn.adapter import export_adapter, import_adapter, merge_adapter
from omnimem_train.models.salmonn.config import VideoSalmonn2AudioConfig, VideoSalmonn2Config
from omnimem_train.models.salmonn.media import Sampling
from omnimem_train.models.salmonn.model import VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Model
from omnimem_train.models.salmonn.processor import Clip, VideoSalmonn2Processor

__all__ = [
    "Clip",
    "Sampling",
    "VideoSalmonn2AudioConfig",
    "VideoSalmonn2Config",
    "VideoSalmonn2ForConditionalGeneration",
    "VideoSalmonn2Model",
    "VideoSalmonn2Processor",
    "export_adapter",
    "import_adapter",
    "merge_adapter",
]
