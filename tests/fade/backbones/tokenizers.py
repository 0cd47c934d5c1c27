"""Tokenizers made in memory, of the tests' own words."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = [
    "a", "an", "the", "of", "in", "and", "cat", "dog", "house", "tree", "car", "horse", "picture", "image", "painting",
    "photo", "van", "gogh", "two", "red", "blue",
]  # fmt: skip
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}


def word_tokenizer(
    length: int, begin: bool = True, padding_side: str = "right", end: bool = True
) -> PreTrainedTokenizerFast:
    """A word a token, `<s>` at the beginning where `begin`, `</s>` at the end where `end`; at most `length` tokens."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    single = " ".join([*["<s>"] * begin, "$A", *["</s>"] * end])
    special = [(token, VOCABULARY[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side=padding_side,
    )
