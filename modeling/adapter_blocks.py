"""The parts of a speech adapter that train: small maps from a module's input or output to a change of its output."""

from torch import nn

from .adapter_config import SpeechAdapterConfig


class MLPBlock(nn.Sequential):
    """Linear, ReLU, dropout for each hidden width, then Linear: `(batch, frames, in)` to `(batch, frames, out)`."""

    def __init__(self, in_features: int, out_features: int, config: SpeechAdapterConfig):
        layers: list[nn.Module] = []
        for size in config.hidden_sizes:
            layers += [nn.Linear(in_features, size), nn.ReLU(), nn.Dropout(config.dropout)]
            in_features = size
        super().__init__(*layers, nn.Linear(in_features, out_features))
        self.kind = config.kind
        if config.kind == "mlp":
            nn.init.zeros_(self[-1].weight)
            nn.init.zeros_(self[-1].bias)


class BottleneckBlock(nn.Sequential):
    """Residual branch of Houlsby et al. (arXiv 1902.00751): norm, down, ReLU, dropout, up; `up` starts at zero."""

    def __init__(self, out_features: int, config: SpeechAdapterConfig):
        size = config.hidden_sizes[0]
        super().__init__(
            nn.LayerNorm(out_features),
            nn.Linear(out_features, size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(size, out_features),
        )
        self.kind = config.kind
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)


def make_block(base: nn.Module, config: SpeechAdapterConfig) -> nn.Module:
    """Returns the block of a fresh adapter around `base`, which has `in_features` and `out_features`."""
    if config.kind == "bottleneck":
        return BottleneckBlock(base.out_features, config)
    return MLPBlock(base.in_features, base.out_features, config)
