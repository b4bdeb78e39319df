"""Languages whose exact conditional probabilities are known.

A language is a frozen dataclass and a pytree: its tables are array leaves, so a compiled function
takes it as an argument. Every language offers

    num_words, max_length          V and T; words are 0..V-1, pad is V
    sample(key, batch_size)        Sentences; sentence b depends on (key, b) alone
    conditional_log_probs(tokens_BxT, lengths_B, masked_BxT=None)
                                   log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV,
                                   in nats and in the tables' dtype; at t it does not depend on
                                   whether x_t is masked; uniform past the end of a sentence
    next_log_probs(tokens_BxT, lengths_B)
                                   log p(next symbol | x_0 .. x_s-1), s = 0..T, BxSxU, in nats and
                                   in the tables' dtype; a symbol is a word, or V: the sentence
                                   stops; at s = T it stops; uniform beyond its stop symbol
    log_prob(tokens_BxT, lengths_B)
                                   log p(sentence, its length included), B nats: the sum of
                                   next_log_probs of its words and its stop symbol
    tasks                          {name: Task}, where a Task offers
        num_classes                C
        labels(sentences, labeling='latent')    (labels_B, valid_B), by one of its `labelings`
        posterior(sentences)                    probs_BxC of the latent label
        prefix_posterior(sentences)             probs_BxTxC, p(there is a label, and it is c |
                                                x_0 .. x_t), from the last word of its place on;
                                                zeros before it and past the end

A language that is a chain of hidden states also offers

    state_beliefs(tokens_BxT, lengths_B)        p(state at t | x_0 .. x_t), BxTxK; zeros past
                                                the end

A text is the exception: `windows.TextWindows` has no conditional_log_probs and no tasks.

A new language is one file with a constructor `(seed, **keywords)`, and one line in LANGUAGES.
"""

from jaxflat.languages.balanced_tree import random_balanced_tree
from jaxflat.languages.dyck import random_dyck
from jaxflat.languages.grammars.pcfg import pcfg_from_file, random_pcfg, random_recursive_pcfg
from jaxflat.languages.hmm import random_hmm

LANGUAGES = {
    "hmm": random_hmm,
    "pcfg": random_pcfg,
    "recursive_pcfg": random_recursive_pcfg,
    "grammar_file": pcfg_from_file,
    "balanced_tree": random_balanced_tree,
    "dyck": random_dyck,
}
