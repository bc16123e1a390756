"""Training loops of other libraries, which are imported only when they are used."""

from adaptc.integrations.trainer import AdapterTrainerMixin

__all__ = ["AdapterTrainerMixin"]
