"""Fine-tuning: data, loss, adapters and one loop."""

from jaxml.tune.fit import fit, loss_of
from jaxml.tune.options import Options
from jaxml.tune.run import Diverged, Stopped
from jaxml.tune.step import optimizer

__all__ = ["Diverged", "Options", "Stopped", "fit", "loss_of", "optimizer"]
