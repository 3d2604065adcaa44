"""Stable Diffusion 3's text: what is left out, long prompts, weights, precisions, tokenizers."""

from __future__ import annotations

import struct
import weakref

import pytest
import torch

from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.families.published.condition import TextOptions
from sfumato.families.published.keys import t5_map
from sfumato.families.published.text import open_t5
from sfumato.families.sd3.condition import READERS, TextStack, encode_prompts, readers_of
from sfumato.families.sd3.text import text_openers, tokenizers_of
from sfumato.nn.narrow import size_of
from sfumato.text.clip_tokens import bundled
from sfumato.text.syntax import parse
from sfumato.text.t5 import T5Config, T5Encoder
from sfumato.text.t5_tokens import find, lay_out, open_file
from sfumato.types import MAX_TEXT_LENGTH as MOST
from small_sd3 import CONFIGS, DEEP, SHAPE, named, one_by_one, t5_tokenizer, theirs

CPU = torch.device("cpu")
L, G, T5 = READERS
PROMPT = "a red metal sphere behind the small blue cube"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def weights():
    return {part: dict(named(part, network.state_dict())) for part, network in theirs().items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """T5's tokenizer.json."""
    return t5_tokenizer(tmp_path_factory.mktemp("words"))


class Opened(dict):
    """Encoders that are opened when asked for; `asked` says of each which others were alive then."""

    def __init__(self, openers):
        super().__init__(openers)
        self.alive, self.asked = {}, {}

    def __getitem__(self, part):
        self.asked[part] = [name for name, encoder in self.alive.items() if encoder() is not None]
        encoder = super().__getitem__(part)()
        self.alive[part] = weakref.ref(encoder)
        return encoder


@pytest.fixture
def stack(weights, words):
    def make(readers=READERS, **options):
        sources = {reader.part: f"the file ({reader.part})" for reader in READERS}
        openers = text_openers(readers, CONFIGS, weights, sources, torch.float32, CPU, **options)
        given = words if T5 in readers else None
        tokenizers = tokenizers_of(readers, None, "the file", given=given, vocabulary=DEEP.vocabulary)
        return TextStack(Opened(openers), tokenizers, SHAPE)

    return make


def features(stack, prompt=PROMPT, **options):
    return encode_prompts(stack, [prompt], None, TextOptions(**options))[0]


# --- what is left out ----------------------------------------------------------------------------------------------


def test_an_encoder_that_is_left_out_leaves_zeros_in_its_place(stack):
    whole = features(stack())
    low, high = SHAPE.clip
    places = {  # rows and columns of the tokens, and columns of the pooled embedding
        "clip_l": (slice(77), slice(low), slice(SHAPE.pooled[0])),
        "clip_g": (slice(77), slice(low, low + high), slice(SHAPE.pooled[0], None)),
        "t5": (slice(77, None), slice(None), slice(0)),
    }
    for left in READERS:
        rest = features(stack([reader for reader in READERS if reader != left]))
        rows, columns, pooled = places[left.name]
        tokens, vector = whole.tokens.clone(), whole.pooled.clone()
        assert tokens[:, rows, columns].abs().amin(-1).gt(0).any()
        tokens[:, rows, columns], vector[:, pooled] = 0, 0
        assert torch.equal(one_by_one(rest), tokens)
        assert torch.equal(rest.pooled, vector)
        assert rest.tokens.shape[1] == (77 + 2 if left == T5 else tokens.shape[1])


def test_t5_alone_draws(stack):
    alone = features(stack([T5]))
    tokens = one_by_one(alone)
    assert torch.equal(tokens[:, 77:], features(stack()).tokens[:, 77:])
    assert not tokens[:, :77].any() and not alone.pooled.any()
    assert alone.tokens.shape[1] == 2 + 256


def test_who_reads_is_settled_by_what_is_there_and_what_is_left_out():
    parts = {"text_encoder", "text_encoder_2", "vae"}
    assert readers_of({*parts, "text_encoder_3"}, [], "m") == READERS
    assert readers_of(parts, ["t5"], "m") == (L, G)
    with pytest.raises(
        CheckpointError, match=r"m holds no T5; give its file by --parts, or leave out by --without t5$"
    ):
        readers_of(parts, [], "m")
    with pytest.raises(
        CheckpointError,
        match=r"no CLIP-L and no CLIP-G; give their files .* --without clip_l --without clip_g$",
    ):
        readers_of({"text_encoder_3"}, [], "m")
    with pytest.raises(InputError, match=r"no text encoder 't6' to leave out; it has clip_l, clip_g, t5"):
        readers_of(parts, ["t6"], "m")
    with pytest.raises(InputError, match="leave one in"):
        readers_of(parts, ["t5", "clip_l", "clip_g"], "m")


def test_no_two_encoders_are_in_memory_together(stack):
    made = stack()
    features(made)
    assert made.encoders.asked == {"text_encoder": [], "text_encoder_2": [], "text_encoder_3": []}


# --- length --------------------------------------------------------------------------------------------------------


def test_long_prompts_are_read_to_their_end(stack):
    long = "a red cube, " * 40  # 160 tokens of CLIP: three windows
    one, other = (features(stack(), long + end) for end in ("a green sphere", "three old cats"))
    assert one.tokens.shape[1] == 3 * 77 + len(open_ids(stack, long + "a green sphere")) + 1
    assert not torch.allclose(one.tokens[:, 154:231], other.tokens[:, 154:231])
    longer = "red cube sphere " * 40  # more than 256 tokens of T5
    whole = features(stack(), longer, length=77).tokens
    count = len(open_ids(stack, longer)) + 1
    assert 256 < count <= MOST and whole.shape[1] % 77 == count % 77


def open_ids(stack, text):
    return stack().tokenizers[T5.part].encode(text)


def test_what_even_t5_cannot_read_is_refused(stack):
    made = stack()
    text = "red cube sphere " * 400
    count = len(open_ids(stack, text)) + 1
    with pytest.raises(InputError, match=rf"the prompt has {count} tokens of T5, .* at most {MOST} are read"):
        features(made, text)
    assert made.encoders.asked == {}
    with pytest.raises(InputError, match="text_length must be from 1 to 512"):
        TextOptions(length=513)


def test_prompt_and_negative_have_one_length(stack):
    wanted, unwanted = encode_prompts(stack(), ["red cube " * 60], [None])
    assert wanted.tokens.shape == unwanted.tokens.shape
    alone = features(stack(), "")
    assert torch.allclose(unwanted.tokens[:, :77], alone.tokens[:, :77], atol=1e-5)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("a1111", "comfy", "compel"))
def test_a_weight_changes_its_words_and_a_neutral_one_nothing(stack, rule):
    marked = {"a1111": "a (red:{}) cube", "comfy": "a (red:{}) cube", "compel": "a (red){} cube"}[rule]
    plain = features(stack(), "a red cube", rule="none").tokens
    assert torch.allclose(features(stack(), marked.format("1.0"), rule=rule).tokens, plain, atol=1e-6)
    strong = features(stack(), marked.format("1.5"), rule=rule).tokens
    assert not torch.allclose(strong[:, 77:], plain[:, 77:], atol=1e-3)
    weak = features(stack(), marked.format("0.5"), rule=rule).tokens
    assert not torch.allclose(weak[:, 77:], plain[:, 77:], atol=1e-3)
    assert torch.equal(features(stack(), marked.format("1.5"), rule=rule, weighting="none").tokens, plain)


def test_weights_lie_on_the_tokens_of_their_words(words):
    tokenizer = open_file(words)
    plain = lay_out([parse("a red cube in front", "none")], tokenizer, 20)[0]
    heavy = lay_out([parse("a (red cube:1.5) in front")], tokenizer, 20)[0]
    assert heavy.ids == plain.ids  # a weight does not cut a prompt otherwise
    weighty = [i for i, weight in zip(heavy.ids, heavy.weights, strict=True) if weight == 1.5]
    assert weighty == tokenizer.encode("red cube")[1:]  # the space before, a token here, is outside


def test_by_comfys_rule_a_weight_goes_from_the_empty_prompt(stack):
    empty, one, three = (
        features(stack(), text, rule="comfy").tokens for text in ("", "(cube:1)", "(cube:3)")
    )
    first = slice(77, 78)
    want = empty[:, first] + 3 * (one[:, first] - empty[:, first])
    assert torch.allclose(three[:, first], want, atol=1e-4)


# --- precision -----------------------------------------------------------------------------------------------------


def test_t5_in_eight_bits_takes_half_and_says_nearly_the_same():
    config = T5Config(width=256, inner=640, layers=2, heads=4, head_width=64, vocabulary=64)
    torch.manual_seed(0)
    encoder = T5Encoder(config)
    for weight in encoder.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=weight.shape[1] ** -0.5)
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.q.weight.data /= 8  # scores are not scaled otherwise
    tensors = encoder.state_dict()
    exact, wide, narrow = (
        open_t5(config, tensors, "t5", dtype, CPU) for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    linear = sum(layer.weight.numel() for layer in encoder.modules() if isinstance(layer, torch.nn.Linear))
    assert size_of(wide) - size_of(narrow) == pytest.approx(linear, rel=0.02)
    ids = torch.randint(0, 64, (2, 40))
    want = exact(ids)
    assert float((narrow(ids) - want).norm() / want.norm()) < 0.03
    assert float((wide(ids) - want).norm() / want.norm()) < 0.02


def test_t5_xxl_in_eight_bits_is_under_five_gib():
    with torch.device("meta"):
        encoder = T5Encoder()
    assert sum(weight.numel() for weight in encoder.parameters()) == 4_762_310_656
    linear = [layer.weight for layer in encoder.modules() if isinstance(layer, torch.nn.Linear)]
    codes, scales = sum(w.numel() for w in linear), 4 * sum(len(w) for w in linear)
    rest = 2 * (4_762_310_656 - codes)
    assert codes + scales + rest < 4.6 * 2**30


def test_float16_of_t5_becomes_bfloat16(stack, weights):
    sources = {reader.part: reader.part for reader in READERS}
    openers = text_openers([T5], CONFIGS, weights, sources, torch.float16, CPU)
    assert openers[T5.part]().shared.weight.dtype == torch.bfloat16
    with pytest.raises(InputError, match="float32, bfloat16 or int8, not float64"):
        text_openers([T5], CONFIGS, weights, sources, torch.float32, CPU, text_dtype=torch.float64)


def test_t5_read_from_the_file_at_each_call_says_the_same(stack):
    assert torch.equal(features(stack([T5], stream=True)).tokens, features(stack([T5])).tokens)
    with pytest.raises(InputError, match="choose one"):
        features(stack([T5], stream=True, text_dtype=torch.int8))


def test_t5_s_table_of_tokens_has_two_names_in_files(weights):
    folder, prefix = weights[T5.part], "text_encoders.t5xxl.transformer."
    twin = {"encoder.embed_tokens.weight": folder["shared.weight"]}
    rest = {name: tensor for name, tensor in folder.items() if name != "shared.weight"}
    ids = torch.arange(30)[None]
    wanted = open_t5(DEEP, folder, "t5", torch.float32, CPU)(ids)
    for state in (folder, folder | twin, rest | twin):
        file = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        tensors = t5_map(DEEP, state.keys()).within(prefix, "").to_ours(file)
        assert torch.equal(open_t5(DEEP, tensors, "t5", torch.float32, CPU)(ids), wanted)


def test_numbers_that_overflow_name_their_block(weights):
    tensors = {name: tensor.clone() for name, tensor in weights[T5.part].items()}
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 1e38
    tensors["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"] *= 1e20
    encoder = open_t5(DEEP, tensors, "t5", torch.float32, CPU)
    with pytest.raises(SfumatoError, match="NaN or infinity in its block 1"):
        encoder(torch.arange(30)[None])
    tensors["encoder.block.2.layer.0.layer_norm.weight"][3] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"t5: encoder\.block\.2\.layer\.0\.layer_norm\.weight holds NaN"
    ):
        open_t5(DEEP, tensors, "t5", torch.float32, CPU)


def test_what_is_no_t5_is_refused(weights):
    with pytest.raises(CheckpointError, match=r"the file does not hold .* missing: encoder\.block\.0"):
        open_t5(DEEP, weights["text_encoder"], "the file", torch.float32, CPU)
    good = {
        "d_model": 96, "d_ff": 160, "num_layers": 3, "num_heads": 4, "d_kv": 16, "vocab_size": 384,
        "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "model_type": "t5",
    }  # fmt: skip
    assert T5Config.from_json(good) == DEEP
    for change, message in (
        ({"feed_forward_proj": "relu"}, "layers of 'relu'; gated-gelu"),
        ({"d_ff": None}, "inner must be a whole number"),
        ({"model_type": "umt5"}, "not T5's: it is of 'umt5'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            T5Config.from_json(good | change)
    with pytest.raises(CheckpointError, match="it lacks d_model, d_ff"):
        T5Config.from_json({})


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_without_a_tokenizer_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.families.sd3.text._cached", lambda: iter(()))
    with pytest.raises(CheckpointError) as caught:
        tokenizers_of(READERS, None, "sd3.safetensors", file=tmp_path / "sd3.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "tokenizer_3"), "tokenizer.json", "--tokenizer", "--without t5"):
        assert part in message
    assert tokenizers_of((L, G), None, "sd3.safetensors").keys() == {L.part, G.part}


def test_a_tokenizer_is_found_in_the_folder_and_beside_the_file(tmp_path):
    t5_tokenizer(tmp_path / "tokenizer_3")
    by_folder = tokenizers_of(READERS, tmp_path, "m", vocabulary=384)
    beside = tokenizers_of(READERS, None, "m", file=tmp_path / "m.safetensors", vocabulary=384)
    for found in (by_folder, beside):
        assert found[T5.part].encode(PROMPT) == by_folder[T5.part].encode(PROMPT)
    assert (found[L.part].pad, found[G.part].pad) == (bundled().eos, 0)
    with pytest.raises(CheckpointError, match="ids; T5's encoder here reads 50"):
        tokenizers_of([T5], tmp_path, "m", vocabulary=50)


def test_files_that_are_no_tokenizer_of_t5_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for text, message in (("{}", "no tokenizer that"), ("\udcff", None)):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=message or "cannot be read as text"):
            open_file(path)
    from tokenizers import Tokenizer, models

    path.write_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(CheckpointError, match="is not T5's: its vocabulary has no </s> and <pad>"):
        open_file(path)
    with pytest.raises(InputError, match="is no tokenizer of T5"):
        tokenizers_of([T5], None, "m", given=tmp_path / "none.json")
    assert find([tmp_path / "nowhere", tmp_path]) == path


def message(*fields: tuple[int, int, bytes]) -> bytes:
    """A Protocol Buffers message of (number, type, encoded value) with numbers below 16."""
    return b"".join(
        bytes([number << 3 | kind]) + (whole(len(value)) if kind == 2 else b"") + value
        for number, kind, value in fields
    )


def whole(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_sentencepiece_model_cuts_as_the_json_made_of_it(tmp_path, words):
    import json

    data = json.loads(words.read_text(encoding="utf-8"))
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    pieces = [
        (
            1,
            2,
            message(
                (1, 2, text.encode()), (2, 5, struct.pack("<f", score)), (3, 0, whole(kinds.get(text, 1)))
            ),
        )
        for text, score in data["model"]["vocab"]
    ]
    path = tmp_path / "spiece.model"
    path.write_bytes(
        message(*pieces, (2, 2, message((3, 0, whole(1)))), (3, 2, message((1, 2, b"identity"))))
    )
    ours, original = open_file(path), open_file(words)
    for text in (PROMPT, "  an  old house, ", "", "4k!", "</s> cube", "xyz ☃"):
        assert ours.encode(text.strip()) == original.encode(text.strip()), text
    assert len(ours) == len(original) + 100
    for broken in (b"", b"\x00", path.read_bytes()[:-3], path.read_bytes()[:300], b"\xff" * 40):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="no unigram model"):
            open_file(path)
    path.write_bytes(message(*pieces, (2, 2, message((3, 0, whole(2))))))
    with pytest.raises(CheckpointError, match="another kind"):
        open_file(path)
