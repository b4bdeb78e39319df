"""Make the masked language model that a config names: a transformer or an LSTM."""

from jaxflat.models.lstm import Lstm
from jaxflat.models.transformer import Transformer

MaskedModel = Transformer | Lstm


def make_masked_model(
    num_words: int,
    max_length: int,
    *,
    name: str,
    width: int,
    num_layers: int,
    head_size: int,
    tied_decoder: bool,
    cls: bool = False,
) -> MaskedModel:
    """Return a "transformer" or an "lstm"; an LSTM ignores max_length, head_size and cls."""
    if name == "lstm":
        return Lstm(num_words, width, num_layers, tied_decoder)
    num_heads = width // head_size
    return Transformer(num_words, max_length, width, num_layers, num_heads, tied_decoder, cls)
