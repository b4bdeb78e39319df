"""Make the language model that a config names: a transformer, masked or causal, or an LSTM."""

from jaxflat.models.causal import CausalTransformer, make_sentence_model
from jaxflat.models.lstm import Lstm
from jaxflat.models.transformer import Transformer

LanguageModel = Transformer | Lstm | CausalTransformer


def make_language_model(
    num_words: int,
    max_length: int,
    *,
    name: str,
    width: int,
    num_layers: int,
    head_size: int,
    tied_decoder: bool,
    cls: bool = False,
    block: str = "gpt",
) -> LanguageModel:
    """Return a "transformer", an "lstm" or a "causal" transformer.

    An LSTM ignores max_length and head_size; only a transformer has cls, only a causal one block.
    """
    if name == "lstm":
        return Lstm(num_words, width, num_layers, tied_decoder)
    if name == "causal":
        return make_sentence_model(
            num_words,
            max_length,
            block=block,
            width=width,
            num_layers=num_layers,
            head_size=head_size,
            tied_decoder=tied_decoder,
        )
    num_heads = width // head_size
    return Transformer(num_words, max_length, width, num_layers, num_heads, tied_decoder, cls)
