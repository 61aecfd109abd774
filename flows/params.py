"""What a run is: every parameter with its default, bound, unit and meaning.

These classes feed the `ekiben` command (`--params FILE`, `--set section.key=value`), the form of the Prefect UI,
MLflow, and docs/configuration.md. Where a run happens (addresses, folders) is in flows/settings.py.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PAIR_COLUMNS = ("text_a", "text_b", "score")
DATA_ADDRESSES = ("pairs", "dev", "test", "retrieval", "profiles", "judgements", "data_rev")
CostName = Literal["p95_ms", "bytes_per_vector", "memory_mb"]
LossName = Literal["auto", "cosine_similarity", "cosent", "angle", "multiple_negatives_ranking"]
DEFAULT_BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class Section(BaseModel):
    """A group of parameters: immutable, and an unknown key is an error instead of a silent typo."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataParams(Section):
    """Which texts and labels, and how they are split. Files are CSV, Parquet or JSON Lines at any fsspec address."""

    pairs: str | None = Field(None, description="Scored pairs for training: columns `text_a`, `text_b`, `score`.")
    dev: str | None = Field(None, description="Pairs for model choice and calibration; without it, split off `pairs`.")
    test: str | None = Field(None, description="Held-out pairs for the final figures; without it, split off `pairs`.")
    retrieval: str | None = Field(
        None, description="Folder in BEIR layout: `corpus.jsonl`, `queries.jsonl`, `qrels/{train,dev,test}.tsv`."
    )
    profiles: str | None = Field(None, description="Table of profiles: `id` and any text columns.")
    judgements: str | None = Field(None, description="Table of graded judgements: `query`, `profile_id`, `relevance`.")
    data_rev: str | None = Field(
        None, description="Git revision of the DVC repository to read local data files at; default: the working tree."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our column name -> the name in your files, e.g. `{text_a: sentence1, score: label}`.",
    )
    score_min: float = Field(
        0.0, allow_inf_nan=False, description="Score in the files that means 'nothing in common' (mapped to 0)."
    )
    score_max: float = Field(
        1.0, allow_inf_nan=False, description="Score in the files that means 'the same' (mapped to 1)."
    )
    profile_template: str | None = Field(
        None,
        description="How a profile becomes `profile_text`, e.g. `{title}. {summary} Skills: {skills}`; "
        "without it all text columns are joined in file order.",
    )
    dev_fraction: float = Field(
        0.15, gt=0, lt=0.5, description="Share of rows split off for dev when no file is given."
    )
    test_fraction: float = Field(
        0.15, gt=0, lt=0.5, description="Share of rows split off for test when no file is given."
    )
    split_seed: int = Field(13, ge=0, description="Seed of the group split.")
    duplicates: Literal["merge", "refuse"] = Field(
        "merge", description="The same pair twice: keep one row with the mean score, or refuse the file."
    )
    leaks: Literal["drop", "refuse"] = Field(
        "drop",
        description="A text of the test or dev file that also stands in an earlier split: drop the row from the "
        "earlier split (never from test), or refuse.",
    )
    max_shared_pairs: float = Field(
        0.05,
        ge=0,
        le=1,
        description="With `leaks: drop`: refuse all the same when more than this share of a held-out file's pairs "
        "stands in the training file too.",
    )
    slice_columns: list[str] = Field(
        default_factory=list,
        description="Further columns of the pairs, such as `language`: a release looks at each of their values apart.",
    )
    min_train_rows: int = Field(32, ge=1, description="Fewer training rows than this are refused.")
    min_eval_rows: int = Field(16, ge=2, description="Fewer dev or test rows than this are refused.")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> DataParams:
        if not self.score_max > self.score_min:
            raise ValueError(
                f"score_max ({self.score_max}) must be above score_min ({self.score_min}); for labels 0..5 set 0 and 5"
            )
        return self


class TrainParams(Section):
    """One candidate: a base model and how it is fine-tuned."""

    base_model: str = Field(
        DEFAULT_BASE_MODEL,
        description="A local folder, a hub id, or the name of a packaged model, which is taken from its package.",
    )
    loss: LossName = Field(
        "auto",
        description="`auto`: cosine similarity for scored pairs, multiple negatives ranking for retrieval data.",
    )
    learning_rate: float = Field(2e-5, gt=0, le=1e-2, description="Peak of the linear schedule with 10 % warm-up.")
    steps: int = Field(60, ge=1, le=100_000, description="Optimizer steps.")
    batch_size: int = Field(16, ge=2, le=1024, description="Pairs a step.")
    max_tokens: int = Field(
        128, ge=8, le=8192, description="Longer texts are cut to this many tokens, in training and in serving."
    )
    freeze_embeddings: bool = Field(True, description="Keep the word embeddings as they are: cheaper, as good.")
    layers: int | None = Field(
        None, ge=1, description="Keep this many transformer layers, evenly spread; default: all."
    )
    distill_steps: int = Field(
        100,
        ge=0,
        le=100_000,
        description="With `layers`: optimizer steps in which the smaller model learns the vectors of the whole one on "
        "the training texts, before it sees a label. They take half of `max_minutes` at most.",
    )
    dimensions: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="Vectors of so many dimensions, by a linear map that begins as the first ones and is trained with "
        "the Matryoshka loss, so that its first half, quarter, ... (16 at least) can be asked for too. At most as many "
        "as the base model has. Default: as many as that, without a map.",
    )
    precision: Literal["auto", "fp32", "int8"] = Field(
        "auto", description="What a release makes of it, unless `release.precision` says otherwise."
    )
    anchor_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Stay near the champion's space: weight of a term, the mean of 1 - cosine of each training text's "
        "vector with the champion's, beside the loss of the labels. 0: free. The dimensions must be the champion's, or "
        "some that it was trained for. Without a champion it does nothing.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of sampling, dropout and new weights.")
    max_minutes: float = Field(
        10.0,
        gt=0,
        description="Wall-clock budget of the fit in minutes; checked between steps, the model so far is kept.",
    )


class EvaluateParams(Section):
    """How a candidate is scored."""

    tolerance: float = Field(
        0.15, gt=0, lt=1, description="`accuracy` is the share of pairs with |score error| below it."
    )
    positive_score: float = Field(
        0.5, gt=0, lt=1, description="Labels at or above it count as 'similar' when the decision threshold is fitted."
    )
    bootstrap_samples: int = Field(1000, ge=100, le=100_000, description="Resamples of the paired bootstrap.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the bootstrap interval.")
    batch_size: int = Field(32, ge=1, le=1024, description="Texts a batch while scoring.")


class FloatRange(Section):
    """A range of real numbers, ends included."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(False, description="Sample on a logarithmic scale.")

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low <= high (and low > 0 when log), found low={self.low}, high={self.high}")
        return self


class SearchSpace(Section):
    """What the study may choose from. A list is a set of choices; `{low, high, log}` is a range."""

    base_model: list[str] = Field(
        default_factory=lambda: [
            DEFAULT_BASE_MODEL,
            "sentence-transformers/all-mpnet-base-v2",
            "sentence-transformers/paraphrase-MiniLM-L6-v2",
        ],
        min_length=1,
        description="Base models; those that cannot be had on this machine are named once and left out.",
    )
    learning_rate: FloatRange = Field(
        default_factory=lambda: FloatRange(low=1e-5, high=8e-5, log=True), description="Learning rate."
    )
    steps: list[int] = Field(default_factory=lambda: [30, 60, 90, 120], min_length=1, description="Optimizer steps.")
    batch_size: list[int] = Field(default_factory=lambda: [16, 32, 64], min_length=1, description="Pairs a step.")
    loss: list[LossName] = Field(default=["auto"], min_length=1, description="Losses.")
    max_tokens: list[int] = Field(default_factory=lambda: [64, 128], min_length=1, description="Tokens a text.")
    layers: list[int | None] = Field(default=[None], min_length=1, description="Transformer layers kept; null: all.")
    dimensions: list[int | None] = Field(default=[None], min_length=1, description="Dimensions of a vector; null: all.")
    precision: list[Literal["auto", "fp32", "int8"]] = Field(
        default=["auto"],
        min_length=1,
        description="Precisions. Where a cost hangs on it, `auto` is priced and scored as it would be served here: in "
        "int8 when that is faster and keeps the limits of a release on dev, else in fp32.",
    )

    @model_validator(mode="after")
    def _within_bounds(self) -> SearchSpace:
        """What the study draws must be allowed in `train`: told now, not after an hour of trials."""
        for name, choice in self:
            for value in (choice.low, choice.high) if isinstance(choice, FloatRange) else choice:
                try:
                    TrainParams.model_validate({name: value})
                except ValidationError as error:
                    raise ValueError(f"{name} {value}: {error.errors()[0]['msg']}, as in train.{name}") from None
        return self


class TuneParams(Section):
    """The budget and the space of the study."""

    trials: int = Field(
        6, ge=1, le=10_000, description="Trials that end the study: finished, hopeless, or failed for good (diverged)."
    )
    minutes: float = Field(
        4.0,
        gt=0,
        description="Wall-clock budget in minutes of one call. The first trial always runs; a later one that would not "
        "fit into what is left is not started.",
    )
    min_improvement: float = Field(
        0.002,
        ge=0,
        description="A candidate replaces the first one (the `train` parameters as given) only when its dev metric is "
        "higher by at least this much: smaller differences are noise.",
    )
    costs: list[CostName] = Field(
        default=["p95_ms", "bytes_per_vector"],
        description="Costs that are minimised beside the dev metric, measured on the exported model on this machine "
        "before it is trained: `p95_ms`, milliseconds of processor time of one core for one text alone, 95th "
        "percentile over dev texts of all lengths (not the wall clock of a request, as `release.max_p95_ms`); "
        "`bytes_per_vector` (float32); `memory_mb`, MiB of a process with model and runtime. `[]`: quality alone, "
        "nothing is measured.",
    )
    max_p95_ms: float | None = Field(
        None, gt=0, description="Limit of cost: a slower model is infeasible, so it is never trained."
    )
    max_bytes_per_vector: int | None = Field(
        None, gt=0, description="Limit of cost: a model with larger vectors is infeasible."
    )
    max_memory_mb: float | None = Field(None, gt=0, description="Limit of cost: a larger model is infeasible.")
    policy: str = Field(
        "best-quality",
        pattern=r"^(best-quality|knee|cheapest-within \d+(\.\d+)?|trial \d+)$",
        description="Which trial becomes the candidate: `best-quality`; `cheapest-within PCT`, the cheapest whose dev "
        "metric is at most PCT percent below the best; `knee`, where more quality begins to cost much; `trial N` of a "
        "study that has been run, which ends it. Another policy on the same study trains nothing again.",
    )
    pruning_checks: int = Field(
        2,
        ge=0,
        le=20,
        description="How many times a trial is scored on a part of dev before its end; one that is clearly behind the "
        "median of those that are as cheap is given up there. 0: never.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the sampler.")
    space: SearchSpace = Field(default_factory=SearchSpace, description="What may be chosen.")

    @property
    def cost_limits(self) -> dict[str, float]:
        """Cost -> the most that is allowed, for those that have a limit."""
        limits = {name: getattr(self, f"max_{name}") for name in get_args(CostName)}
        return {name: float(limit) for name, limit in limits.items() if limit is not None}

    @model_validator(mode="after")
    def _costs_once(self) -> TuneParams:
        if len(set(self.costs)) < len(self.costs):
            raise ValueError(f"costs names one twice: {', '.join(self.costs)}")
        return self


class ReleaseParams(Section):
    """What a candidate must prove before it ships."""

    min_cosine: float = Field(
        0.9999, gt=0, le=1, description="Parity with sentence-transformers and of a batch with its singles, at least."
    )
    alias: Literal["champion", "challenger"] = Field(
        "champion", description="What it becomes: the champion, or the challenger that servers may shadow first."
    )
    allow_rolled_back: bool = Field(
        False, description="Whether a version that a rollback has left may become the champion again."
    )
    min_gain: float = Field(
        0.0,
        allow_inf_nan=False,
        description="Test metric minus the base model's: the low end of the paired bootstrap's interval, at least.",
    )
    champion_margin: float = Field(
        -0.01,
        allow_inf_nan=False,
        description="Test metric minus the champion's, on the same rows: the low end of the interval, at least. "
        "Negative: may be that much worse; 0 or more: must be better.",
    )
    slices: list[str] = Field(
        default_factory=lambda: ["length"],
        description="Parts of the test rows that are looked at apart: `length` (short, medium, long), `language` "
        "(found by the text, a guess when it is short), or columns kept by `data.slice_columns`.",
    )
    slice_min_rows: int = Field(30, ge=2, description="Smaller slices are shown, not judged.")
    slice_max_drop: float = Field(
        0.02,
        ge=0,
        le=2,
        description="A slice may lose this much of the champion's metric (of the base model's when there is none). It "
        "refuses only when the loss is certain: when the whole interval, widened for the number of slices, is beyond.",
    )
    slice_floors: dict[str, float] = Field(
        default_factory=dict, description="Floors of the metric by slice, e.g. `{language=de: 0.7}`."
    )
    max_calibration_error: float = Field(
        0.1, gt=0, le=1, description="Mean distance of calibrated scores from labels, over bins of the test rows."
    )
    max_leaked_share: float = Field(
        0.01, ge=0, le=1, description="Share of test texts that stand in train too, but for case and punctuation."
    )
    max_data_age_days: float | None = Field(None, gt=0, description="Older training data are refused.")
    licences: list[str] = Field(
        default_factory=list,
        description="Licences that a base model may have, e.g. `[apache-2.0, mit]`; empty: any, also an unknown one.",
    )
    max_p95_ms: float | None = Field(None, gt=0, description="p95 of one short text, asked of the built Bento.")
    min_texts_per_s: float | None = Field(None, gt=0, description="Texts a second of the built Bento.")
    max_start_s: float | None = Field(None, gt=0, description="Seconds from the start of the Bento to readiness.")
    max_memory_mb: float | None = Field(None, gt=0, description="Memory of the serving worker in MiB.")
    max_slowdown: float = Field(
        2.0,
        gt=0,
        description="p95, time a text, start and memory may be this many times the champion's, measured beside it.",
    )
    compat: Literal["any", "adapter", "compatible", "identical"] = Field(
        "any", description="Worst relation to the champion's space that is let pass."
    )
    compat_min_recall: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Recall@10 of new queries on old vectors, where the old model's own queries find all, at least: as "
        "they are for `compatible` (there also where every other document is a new vector), mapped for `adapter`; "
        "after a rollback of old queries on new vectors. A model that was trained further and rebuilt its index finds "
        "80 to 90 % of what it found before.",
    )
    compat_min_ndcg: float = Field(
        0.95,
        gt=0,
        le=1,
        description="nDCG@10 by the labels (judged documents; pairs scored 0.5 or more) of new queries on old vectors, "
        "as a share of what the old model's own queries reach, at least.",
    )
    compat_min_cosine: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Mean cosine of the old and the new vector of the same text, at least, as they are or mapped.",
    )
    precision: Literal["auto", "fp32", "int8"] = Field(
        "auto",
        description="What the server computes in. `auto`: what the run's `train.precision` says, and when that is "
        "`auto` too, int8 when it is certified, else fp32; `fp32`: no int8 is made; `int8`: no release without it. "
        "fp32 is always in the box as well.",
    )
    int8_max_loss: float = Field(
        0.005,
        ge=0,
        le=1,
        description="int8 may lose this much Spearman, and nDCG@10 when there is retrieval data, of fp32 on the test "
        "rows; so may fp32 on one side of a comparison with int8 on the other.",
    )
    int8_mean_cosine: float = Field(
        0.99, gt=0, le=1, description="Mean cosine of int8 with fp32 over the test texts, at least."
    )
    int8_min_cosine: float = Field(
        0.95, gt=0, le=1, description="Cosine of int8 with fp32 for the worst of the edge and test texts, at least."
    )
    int8_min_speedup: float = Field(
        1.1,
        gt=0,
        description="int8 must compute at least this many times the texts of fp32 in the same time, on the machine of "
        "the release.",
    )


class Params(Section):
    """Everything: the sections of a params file."""

    data: DataParams = Field(default_factory=DataParams)
    train: TrainParams = Field(default_factory=TrainParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    tune: TuneParams = Field(default_factory=TuneParams)
    release: ReleaseParams = Field(default_factory=ReleaseParams)
