"""The embedded tokenizer: byte-level BPE over the embedded corpus, with every digit a token of its own."""

from __future__ import annotations

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpr_lightning.demo.corpus import corpus_documents

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

VOCAB_SIZE = 512

# A digit, a word, a line end or a sign, each with at most one space in front. Nothing crosses a line end, so a
# prompt and its response tokenize to the same ids apart as together.
_PIECES = r" ?[0-9]| ?\p{L}+|\n| ?[^\s\p{L}0-9]|\s"


def build_tokenizer(*, seed: int, num_documents: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on clean documents of the corpus; the same seed gives the same tokenizer.

    All 256 bytes are in the vocabulary, so any text survives encoding and decoding. BOS is put in front of every
    text by the post-processor; EOS is not added.

    Args:
        seed: Seed of the corpus.
        num_documents: How many of its first documents to train on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = corpus_documents(seed=seed, num_clean=num_documents)
    tokenizer.train_from_iterator(islice(documents, num_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
