"""Writes the golden numbers of the tests: python tests/golden/make.py (needs the extra "oracle").

families.npz: logits of transformers on the models of families.py, float32 on CPU, at six positions.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

POSITIONS = (0, 1, 7, 15, 31, 39)


def reference_model(name: str):
    """A family's small model in transformers, with the weights of `families.weight`."""
    import torch
    import transformers

    from tests.golden import families

    config = dict(families.FAMILIES[name])
    kind = transformers.CONFIG_MAPPING[config.pop("model_type")]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**config), attn_implementation="eager")
    state = {k: torch.from_numpy(families.weight(k, tuple(v.shape))) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval().float()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()


def main() -> None:
    from tests.golden import families

    out = {name: logits(reference_model(name), families.tokens())[:, POSITIONS] for name in families.FAMILIES}
    np.savez_compressed(Path(__file__).parent / "families.npz", **out)


if __name__ == "__main__":
    main()
