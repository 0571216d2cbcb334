"""Fine-tuning: data, loss, adapters and one loop."""

from jaxml.tune.fit import Options, Stopped, fit

__all__ = ["Options", "Stopped", "fit"]
