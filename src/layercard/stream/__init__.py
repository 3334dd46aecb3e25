"""A profile of a model that stays on disk: its blocks are in memory one at a time."""

from layercard.stream.profile import stream_profile
from layercard.stream.streamed import StreamedModel, open_model

__all__ = ["StreamedModel", "open_model", "stream_profile"]
