"""Fine-tuning: data, loss, adapters and one loop."""

from jaxml.tune.fit import Options, Stopped, fit, loss_of, optimizer

__all__ = ["Options", "Stopped", "fit", "loss_of", "optimizer"]
