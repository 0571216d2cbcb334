"""Fine-tuning: data, loss, adapters and one loop."""

from jaxml.tune.fit import Options, Stopped, fit, optimizer

__all__ = ["Options", "Stopped", "fit", "optimizer"]
