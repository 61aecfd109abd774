"""Small real things for tests: a sentence-transformers model of a few kilobytes, and a lunchbox packed from it.

Nothing is downloaded and nothing depends on the order of calls: the same arguments give the same bytes of weights.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from bentos.batcher import Limits

TINY_DIM = 32
TINY_MAX_TOKENS = 64
TINY_RUN_ID = "0123456789abcdef0123456789abcdef"

# Every kind of model that can be exported, beside the plain one: arguments of `make_tiny_model`.
VARIANTS: dict[str, dict[str, Any]] = {
    "other weights": {"seed": 1},
    "cls and dense": {"pooling": "cls", "dense_dim": 16},
    "max and layer norm": {"pooling": "max", "layer_norm": True},
    "last token, raw, prompts": {
        "pooling": "lasttoken",
        "normalize": False,
        "prompts": {"query": "query: "},
        "default_prompt": "query",
    },
}

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Whole words that tests are likely to use; everything else in Latin letters is spelt with the pieces below.
_WORDS = """
a about after again all also an and any are around as ask at away back bad be because been before bench best better
between big black blue board boat book both boy bread bridge bring brown build bus but buy by cake call came can car
case cat change chef child city class clean clear cloud coach code coffee cold come computer cook could country cup
cut dance dark data day deep design developer did different dinner do document dog done door down draw drink drive
dry each early earth eat egg embed end engine engineer even every eyes face fall family far farm fast father feel few
field find fire first fish five flower flute fly food for four fox free friend from front fruit full game garden get
girl give glass go good grass great green ground group grow guitar had half hand happy hard has have he head hear
heart help her here high him his hold home horse hot hour house how i idea if in into is it its jazz job jump jumps
just keep key kind king kitchen know lady language large last late laugh lazy lead learn leave left less let letter
life light like line list listen little live long look love low lunch machine made make man manager many map match me
mean men might mile milk model moon more morning mother mountain move much music must my name near need network never
new next night no north not note nothing now number of off office often old on one only open or other our out over own
page paint paper park part people person phone piano picture place plan plane plant play player point potato power
profile program project python quick quiet rain ran read red rest rice ride right ring river road rock role room
round run running rust said sail same sat say school science sea search second see sell senior sentence server set
seven ship short should show side sing sit six sky sleep slice slow small snow so software some song soon sound south
space speak stand star start station stay still stop store story street strong student sun swim table take talk
teach team tell ten test text than that the their them then there these they thing think this those three through
time to today together tomorrow too took top town train travel tree true try turn two under until up us use user
valley vector very violin voice walk want warm was watch water way we week well went were west what wheel when where
which while white who why will wind window winter with woman women wood word work world would write year yellow yes
you young your zero
"""
_PIECES = "ing ed er est ly ion tion ment ness able less ful al ity ous ive es en th st nd rd 's ck sh ch qu"


def tiny_vocabulary() -> list[str]:
    """List special tokens, words, then every printable ASCII character as a word and as a continuation, then pieces."""
    singles = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    continued = [f"##{piece}" for piece in [*string.ascii_lowercase, *string.digits, *_PIECES.split()]]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *_WORDS.split(), *singles, *continued]))


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    pooling: str | tuple[str, ...] = "mean",
    normalize: bool = True,
    dense_dim: int | None = None,
    layer_norm: bool = False,
    extra_modules: tuple[Any, ...] = (),
    include_prompt: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    max_tokens: int = TINY_MAX_TOKENS,
) -> Path:
    """Save a sentence-transformers model with a 2-layer, 32-dimensional BERT in `folder` and return the folder.

    Args:
        folder: Where to save; created when missing.
        seed: Seed of the weights. Other seeds give other vector spaces.
        pooling: One of sentence-transformers' pooling modes, or several that are concatenated.
        normalize: Whether the last module scales vectors to length 1.
        dense_dim: When given, a Dense module with tanh maps to this many dimensions.
        layer_norm: Whether a LayerNorm module follows the pooling.
        extra_modules: Further modules, put before Normalize.
        include_prompt: Whether the tokens of a prompt take part in the pooling.
        prompts: Prompt name -> text, kept in `config_sentence_transformers.json`.
        default_prompt: Name of the prompt used when none is asked for.
        max_tokens: Longer texts are cut.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = {token: index for index, token in enumerate(tiny_vocabulary())}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=TINY_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * TINY_DIM,
        max_position_embeddings=512,
        initializer_range=0.25,  # the usual 0.02 would leave all texts with nearly the same vector
    )
    folder.mkdir(parents=True, exist_ok=True)
    backbone = folder.parent / f".{folder.name}-backbone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(backbone)
        BertTokenizerFast(vocab=vocabulary, model_max_length=max_tokens).save_pretrained(backbone)
        modules: list[Any] = [Transformer(str(backbone)), Pooling(TINY_DIM, pooling, include_prompt=include_prompt)]
        width = modules[-1].get_embedding_dimension()
        if layer_norm:
            modules.append(LayerNorm(width))
            torch.nn.init.normal_(modules[-1].norm.weight)
            torch.nn.init.normal_(modules[-1].norm.bias)
        if dense_dim is not None:
            modules.append(Dense(width, dense_dim))
    modules.extend(extra_modules)
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, default_prompt_name=default_prompt)
    model.save(str(folder), create_model_card=False)
    for path in backbone.iterdir():
        path.unlink()
    backbone.rmdir()
    return folder


# What BentoML keeps beside a model; `version` is the only thing that differs.
MODEL_YAML = """\
name: ekiben-model
version: {version}
module: ''
labels: {{}}
options: {{}}
metadata: {{}}
context:
  framework_name: ''
  framework_versions: {{}}
  bentoml_version: 1.4.39
  python_version: 3.11.7
signatures: {{}}
api_version: v1
creation_time: '2026-11-23T00:00:00+00:00'
"""


def make_tiny_lunchbox(
    folder: Path, *, model_path: Path | None = None, version: str = "1", run_id: str = TINY_RUN_ID, **model: Any
) -> Path:
    """Pack a lunchbox of `model_path`, or of a tiny model made with the arguments in `model`, and return its folder."""
    from bentos.manifest import DataVersion
    from flows.core.lunchbox import ReleaseFacts, pack_lunchbox

    if model_path is None:
        model_path = make_tiny_model(folder.parent / f"{folder.name}-model", **model)
    facts = ReleaseFacts(
        name="ekiben",
        version=version,
        run_id=run_id,
        data=DataVersion(path="tests/pairs.csv", md5="d41d8cd98f00b204e9800998ecf8427e"),
        base_model="tiny",
        metrics={"base/spearman": 0.5, "eval/spearman": 0.6, "gain/spearman": 0.1, "gain/low": 0.05, "gain/high": 0.15},
    )
    pack_lunchbox(model_path, folder, facts, min_cosine=0.9999)
    return folder


def make_limits(**changed: Any) -> Limits:
    """Limits of a batcher: one thread, and else as wide as no test minds."""
    usual: dict[str, Any] = {
        "threads": 1,
        "max_tokens": TINY_MAX_TOKENS,
        "batch_tokens": 64,
        "batch_texts": 8,
        "interactive_texts": 4,
        "interactive_wait_s": 60.0,
        "queue_tokens": {"interactive": 10_000, "bulk": 100_000},
        "cache_bytes": 0,
        "stall_s": 60.0,
    }
    return Limits(**usual | changed)
