"""omnimem_train: teach streaming audio-visual LLMs to live inside a fixed memory budget."""

__version__ = "0.1.0"
