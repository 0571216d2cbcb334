"""Fine-tuning: data, loss, adapters and one loop."""

from jaxml.tune.fit import Diverged, Options, Stopped, fit, loss_of, optimizer

__all__ = ["Diverged", "Options", "Stopped", "fit", "loss_of", "optimizer"]
