"""The hooks, in the order of a run: this file is the manual for plugin authors.

A plugin is a dataclass. Its fields are its options; the methods it marks with `@engine.hookimpl`
are its hooks. It fills one slot of a recipe: `load`, `quantize`, `heads`, `position_encoding`,
`attention`, `cache`, `decode`, `task` or `observe`.

Two kinds of hook:

*provider*    The plugin in the slot of the same name answers, and nobody else; `None` is no answer.
*collecting*  Every chosen plugin may answer; `None` adds nothing.

Any plugin may wrap any hook with `@engine.hookimpl(wrapper=True)`: a generator that yields once,
and gives back what the yield returned (or something else).

Each hook takes one argument, a frozen dataclass of `engine.contexts`. Hooks run while building or
once per conversation, never per token: they return plain callables and objects for the loop.
Option dataclasses hold options only. What a hook returns is kept in `session.built[<hook>]`, and
`receipts` reads it there, so that two sessions can share a plugin object.

A plugin may state, as class attributes or properties,

    provides = ("cache.static",)                    # traits that others may need or exclude
    needs = {"attention.bias": "attention=sdpa"}    # trait → what to type when it is missing
    excludes = {"cache.quantized": "cache=dynamic"} # trait → what to type when it is there
    engine_api = ">=1,<2"                           # hook contracts it works with

Where the reason is not plain, an `engine.rules.Rule` stands in place of the hint, with its source.
`alarms` (trait → Rule) refuses nothing: what works, and perhaps not well, is told as a note.
State traits, never names of choices: then plugins that do not know each other combine. In use are

    model.known                 transformers has its code; the traits below are read from it
    model.attention_interface   it takes attention from outside; .sdpa, .flex, .flash: it has these
    model.rope, .learned_positions, .sinusoidal, .alibi     how it encodes positions
    model.alibi_by_mask         it makes ALiBi biases as long as the padding mask (BLOOM, Falcon)
    model.longrope              it reads 'yarn' as longrope (Phi-3 and kin)
    model.rope_varies           its rotary frequencies depend on the length of the text
    model.split_kv, .kv_heads   projections of keys and values apart; their heads can be fewer
    model.latent_kv, .sliding, .moe, .softcap, .sinks     MLA; windows; experts; capped scores;
                                learned sinks
    model.recurrent, .uncroppable     layers keep a state, which tokens cannot be taken out of
    model.attention_free        no layer attends, nor keeps keys
    model.own_cache, .own_layers      it takes no cache of transformers; it has layers in one of
                                types that only its own code knows
    model.bias_by_mask          it makes biases for as many keys as its masks have (Inkling)
    weights.packed, .unsavable  the weights are no plain numbers any more; nor can they be saved
    weights.by_pass             how a token is rounded depends on all tokens of the pass
    quantize.reads.*            it has a quantizer for checkpoints of this `quant_method`
    heads.pooled                key/value heads are means of the checkpoint's
    position.varies             rotary frequencies depend on the length of the text
    model.key_bias              keys get a bias and no norm: they may lie far from zero
    position.bias, .scores, .rotation     attention must add a bias, compute other scores, or get
                                queries and keys rotated, where a cache keeps keys ...
    attention.bias, .scores, .rotation    ... and can
    attention.window, .flash    old tokens are hidden; no mask of queries and keys is taken
    load.random, .offloaded, .dispatched     the weights are made up; some lie on the CPU or on
                                disk; they may be spread over devices
    cache.none, .dynamic, .static     nothing is kept; it grows; it has a fixed size and compiles
    cache.croppable             the last tokens can be taken back
    cache.evicting, .quantized, .offloaded, .unrepeatable     it forgets; it rounds; it lives
                                elsewhere; its rows cannot be doubled or reordered
    decode.compiled, .assisted, .beam, .sampling     steps are compiled; drafts are tried; several
                                at once; tokens are drawn
    target.cpu, .cuda, .mps, .bfloat16, .fp8     the device, and what it computes in

A choice that changes nothing is an error, unless that is its point and it says so: with the trait
`<slot>.unchanged` (`quantize`, `heads`, `position_encoding`, `attention`), or `cache.none`.

An exception or a wrong type from a hook is reported with the plugin's name, the hook and the
distribution it comes from (exit code 5). Raise `engine.errors.RecipeError` to refuse an option.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.contexts import (
        Attention,
        AttentionContext,
        CacheContext,
        CheckContext,
        ConfigureContext,
        DecodeContext,
        Decoder,
        EstimateContext,
        Event,
        Heads,
        HeadsContext,
        KeyValues,
        LoadContext,
        Loaded,
        ModelConfig,
        PositionContext,
        PositionEncoding,
        PrepareContext,
        Quantization,
        QuantizeContext,
        Receipt,
        ReshapeContext,
        Task,
        TaskContext,
        Term,
    )
    from engine.errors import Problem
    from engine.session import Session
    from engine.shape import ModelShape

API_VERSION = "1.3"
"""Version of this contract. A plugin's `engine_api` is checked against it."""

hookspec = pluggy.HookspecMarker("engine")
hookimpl = pluggy.HookimplMarker("engine")

# ---------------------------------------------------------------------------------------------
# Before anything loads. torch is not imported yet, and must not be.
# ---------------------------------------------------------------------------------------------


@hookspec
def configure(context: ConfigureContext) -> ModelConfig | None:
    """Say what the model's config is, where the file of its weights tells that.

    Collecting. Only the plugin in `load` may answer. Runs first, when the model's folder is on this
    machine; `None` leaves it at the folder's config.json. Raise `CheckpointError` for files that
    contradict each other.

        @hookimpl
        def configure(self, context):
            header = read_header(context.folder / self.file)
            return ModelConfig(config={"model_type": "llama", "hidden_size": header["width"], ...})
    """


@hookspec
def reshape(context: ReshapeContext) -> ModelShape | None:
    """Say what the choice makes of the shape of the model: key/value heads, context.

    Collecting. They answer one after the other in the order of the slots: each gets what those
    before made of the shape, and `None` leaves it. Runs when the model's config is known. Option
    values that `check` refuses leave the shape alone.

        @hookimpl
        def reshape(self, context):
            return dataclasses.replace(context.shape, max_positions=None)
    """


@hookspec
def check(context: CheckContext) -> Iterable[Problem] | None:
    """Refuse option values and combinations that cannot work.

    Collecting. Runs after composing, before anything is loaded or downloaded.

    Gets the recipe, the model's shape (None if its config.json is not here yet), the target, and
    the traits of everything chosen. Gives problems: what was asked, why not, what to type instead.

        @hookimpl
        def check(self, context):
            if self.size < 1:
                yield Problem(slot="attention", code="value", message="attention.size must be > 0",
                              hint="attention.size=1024")
    """


@hookspec
def estimate(context: EstimateContext) -> Iterable[Term] | None:
    """Name what the choice adds to a pass through the model: memory and work.

    Collecting. Runs after composing when the model's shape is known, for the pass of a prompt and
    for that of a token, at several lengths: `engine check` and `engine plan` reckon with it.

    Gets shape, target and pass: sequences, tokens of each that go through and that are kept. Gives
    terms: bytes and when they are held; operators started, bytes moved, operations in a number
    format. What a choice does in another's place, it alone names: `quantize` all weights and their
    products, `attention` the scores, `cache` keys and values, `decode` what is beside the model.

        @hookimpl
        def estimate(self, context):
            yield Term(name="ring buffer", bytes=context.batch * self.size * 2)
    """


# ---------------------------------------------------------------------------------------------
# Building. Configs first, then weights, then what runs them.
# ---------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def position_encoding(context: PositionContext) -> PositionEncoding | None:
    """Say how the model encodes positions.

    Provider. First hook after the model's config is read; no weights exist yet, which is why a
    change made here takes effect and one made to a loaded model may not.

    Gets the config. Gives a config: edit a copy, never the one you got.

        @hookimpl
        def position_encoding(self, context):
            config = copy.deepcopy(context.config)
            config.rope_parameters["rope_theta"] *= self.factor
            return PositionEncoding(config=config)
    """


@hookspec(firstresult=True)
def heads(context: HeadsContext) -> Heads | None:
    """Say how many key/value heads there are, and convert the weights to it.

    Provider. Runs after `position_encoding`. The converters apply while the weights load, before
    they are quantized.

    Gets the config. Gives a config and `transformers.core_model_loading.WeightConverter` objects.

        @hookimpl
        def heads(self, context):
            return Heads(config=context.config)
    """


@hookspec(firstresult=True)
def quantize(context: QuantizeContext) -> Quantization | None:
    """Say in how many bits the weights are kept.

    Provider. Runs after `heads`, before loading.

    Gets config, dtype and device. Gives a quantization config of transformers (its own, or one
    registered with `transformers.quantizers.register_quantization_config`), and a function that
    receives the loaded model. Operators on packed weights crash or compute wrong numbers for some
    shapes on some CPUs: `refuse_known` and `refuse_loaded` of `engine.quantizing.refusing`, called
    in `check` and in `prepare`, try the model's layers on this CPU, once.

        @hookimpl
        def quantize(self, context):
            return Quantization(config=TorchAoConfig(Int8WeightOnlyConfig()))
    """


@hookspec(firstresult=True)
def attention(context: AttentionContext) -> Attention | None:
    """Supply the function that computes attention, and the one that builds its mask.

    Provider. Runs after `quantize`, before loading. The core registers forward and mask together,
    under a name of the session's own.

    Gets the config. Gives the name of an implementation of transformers, or forward and mask:
    query `[batch, heads, queries, head_dim]`, key and value `[batch, kv_heads, keys, head_dim]`
    (already rotated and cached, heads not repeated) → `[batch, queries, heads, head_dim]`.

        @hookimpl
        def attention(self, context):
            return Attention(forward=my_forward, mask=sdpa_mask)
    """


@hookspec(firstresult=True)
def load(context: LoadContext) -> Loaded | None:
    """Make the model, with everything above applied.

    Provider. The most expensive step. Fails closed: raise `CheckpointError` for a file, tensor,
    shape or value that is not what the config promises.

    Gets the folder, the config, dtype, device, and what the hooks above gave. Gives the model in
    evaluation mode on the device, and the tokenizer.

        @hookimpl
        def load(self, context):
            model = AutoModelForCausalLM.from_config(context.config, dtype=context.dtype)
            return Loaded(model=model.eval(), tokenizer=None)
    """


@hookspec
def prepare(context: PrepareContext) -> PreTrainedModel | None:
    """Make the loaded model ready: compile it, set flags of kernels.

    Collecting. Runs once after `load`. Change the model in place and give it back; `None` says
    that there was nothing to do. What the user should know goes into `context.notes`.

        @hookimpl
        def prepare(self, context):
            context.model.forward = torch.compile(context.model.forward)
            return context.model
    """


# ---------------------------------------------------------------------------------------------
# Running.
# ---------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def cache(context: CacheContext) -> KeyValues | None:
    """Make the place for the keys and values of one conversation or batch.

    Provider. Runs when a conversation starts, not per turn and not per token.

    Gets the config, the batch size, and the number of tokens a sequence may grow to. Gives a fresh
    `transformers.Cache`, or `KeyValues(cache=None)` to recompute.

        @hookimpl
        def cache(self, context):
            return KeyValues(cache=DynamicCache(config=context.config))
    """


@hookspec(firstresult=True)
def decode(context: DecodeContext) -> Decoder | None:
    """Supply the loop that turns token ids into more token ids.

    Provider. Runs once, after `prepare`.

    Gets model, tokenizer and seed. Gives a decoder: called with a `Generation` (token ids and mask
    `[batch, tokens]`, a cache which may already hold their beginning, a limit), it yields a list
    of `batch` token ids per step. Closing the iterator must stop it. The plugin has an option
    `max_new_tokens: int`, and may have `stop: list[str]`: the task looks for these in the new text,
    cuts it there and closes the iterator, whether or not the decoder stops there by itself. A
    decoder may have a method `close()`, which ends all that it still does.

        @hookimpl
        def decode(self, context):
            def decoder(generation):
                for _ in range(generation.max_new_tokens):
                    yield [next_token(context.model, generation)]
            return decoder
    """


@hookspec(firstresult=True)
def task(context: TaskContext) -> Task | None:
    """Supply what the recipe is for: inputs in, outputs out.

    Provider. Runs last in building. The task uses the session's model, tokenizer, decoder and
    caches; its `probe` sends the smallest possible input through all of them.

    Gets the session. Gives an object with `probe`, `stream`, `batch` and `chat`
    (`engine.contexts.Task`).

        @hookimpl
        def task(self, context):
            return Classify(context.session)
    """


# ---------------------------------------------------------------------------------------------
# Proof and observation.
# ---------------------------------------------------------------------------------------------


@hookspec
def receipts(session: Session) -> Iterable[Receipt] | None:
    """Prove that the choice took effect.

    Collecting. Runs after the probe, and again when a run ends. Every slot must have at least one
    receipt; one that is not `ok` stops the build. Evidence is read from the session: the model,
    `session.built`, the operators counted in `session.probe`.

        @hookimpl
        def receipts(self, session):
            calls = session.probe.operators["aten::softmax"]
            yield Receipt(slot="attention", claim="softmax in plain torch",
                          evidence={"calls": calls}, ok=calls > 0)
    """


@hookspec
def observe(event: Event) -> None:
    """Look on: log, meter, trace.

    Collecting. Runs when a session was built, and when a run started, finished or failed. What is
    returned is ignored; to time a hook, wrap it.

    Gets what happened, as `event.kind`, with `event.data`:

    - `built`: `recipe` (its name), `digest`
    - `started`: `prompt_tokens` (of a batch: of all its prompts)
    - `finished`: `finish_reason` and the fields of `Figures`; of a batch only `sequences`
    - `failed`: `error` (its type and message); an answer that is broken off has no event after
      `started`

    To remember something, put it into `event.kept`: one dict for each session, which `receipts`
    finds at `session.built["observe"]` (empty before `built`).

        @hookimpl
        def observe(self, event):
            if event.kind == "started":
                event.kept["runs"] = event.kept.get("runs", 0) + 1
    """


SLOTS = (
    "load",
    "quantize",
    "heads",
    "position_encoding",
    "attention",
    "cache",
    "decode",
    "task",
    "observe",
)
"""The questions that a recipe answers. Each names a group, a folder and entry points."""

OPTIONAL_SLOTS = ("observe",)
"""Slots that a recipe may leave empty."""
