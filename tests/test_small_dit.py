"""The text-to-video transformer beside the small model: its pipeline and captions, and that its training repeats."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lightcache_fx as lc
from examples.small_model import captions, data, dit, losses, reading, sample_dit, sprites, train
from examples.small_model.fit import FitOptions, Run, fit
from examples.small_model.measures import psnr_db
from lightcache_fx import Cache, Policy, Residual

TINY = dit.DiTConfig(num_layers=2, num_heads=2, head_dim=8, text_dim=16, text_layers=1)
PROMPT = "a red fish swims steadily right from the middle left at sea"
MIDDLE_BLOCKS = Residual(first="transformer_blocks.1", last="transformer_blocks.5")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The pipeline as it is exported and loaded; random weights stand for those that training starts at zero."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    denoiser = dit.TextDenoiser(dit.DiTConfig())
    for parameter in denoiser.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    run = Run(denoiser, FitOptions(folder / "dit", seed=0, steps=0, learning_rate=0.0, decay_steps=1, evaluate_every=1))
    (folder / "dit").mkdir()
    run.save()
    train.export_dit(folder, folder / "latte-sprites")
    return sample_dit.load_pipeline(folder / "latte-sprites")


@pytest.fixture(scope="module")
def plain_clip(pipeline):
    return _generate(pipeline)


def _generate(pipeline, prompt=PROMPT, steps=10, seed=0):
    return sample_dit.generate(pipeline, prompt, steps=steps, guidance_scale=2.0, seed=seed)


def _clip(kind="fish", colour="red", start=(7.0, 16.0), heading=0.0, backdrop="sea", bucket=136):
    sprite = sprites.SpriteSpec(kind, colour, 6.75, start, heading)
    return sprites.ClipSpec(backdrop, 24.0, (sprite,), bucket)


def test_folder_loads_as_the_latte_pipeline(pipeline):
    names = {name: type(component).__name__ for name, component in pipeline.components.items()}
    assert names == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKLTemporalDecoder",
        "transformer": "LatteTransformer3DModel",
        "scheduler": "EulerDiscreteScheduler",
    }
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_the_shipped_weights_show_what_the_words_say():
    spec = sample_dit.heldout_clips(4)[3]
    assert captions.caption(spec) == "a red fish swims quickly left from the upper centre by day"
    shipped = sample_dit.load_pipeline()
    frames = sample_dit.generate(shipped, captions.caption(spec), steps=25, guidance_scale=2.0, seed=3)
    found = reading.compare_with_words(frames, spec)
    assert found["backdrop"] == 1
    assert found["colour"] > 0.7
    assert found["kind"] > 0.7
    folder = sample_dit.DIT_FOLDER
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12_000_000


def test_without_weights_the_samples_say_how_to_get_them(tmp_path):
    said = CliRunner().invoke(
        sample_dit.app, ["--model", str(tmp_path / "latte-sprites"), "--target", str(tmp_path / "new")]
    )
    assert said.exit_code == 2
    assert "there is no pipeline in latte-sprites: train it with" in " ".join(said.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_a_caption_says_what_the_clip_shows():
    assert captions.caption(_clip()) == PROMPT
    slow = _clip("beetle", "pink", start=(25.0, 25.0), heading=-np.pi / 2, backdrop="desert", bucket=48)
    assert captions.caption(slow) == "a pink beetle crawls slowly up from the lower right on sand"
    two = replace(_clip(), sprites=(_clip().sprites[0], _clip("car", "blue", (20.0, 16.0), np.pi).sprites[0]))
    assert captions.caption(two) == (
        "a red fish swims steadily right from the middle left"
        " and a blue car drives steadily left from the middle centre at sea"
    )


def test_captions_of_one_sprite_are_equally_long_and_use_the_words_there_are():
    written = [captions.caption(spec).split() for spec in captions.single_clips(0, 200)]
    assert {len(words) for words in written} == {captions.NUM_WORDS}
    assert {word for words in written for word in words} == set(captions.WORDS) - {"and"}


def test_a_pace_is_a_third_of_the_speeds_and_a_place_a_ninth_of_the_picture():
    low, high = sprites.MOTION_BUCKETS
    buckets = range(low, high + 1)
    assert [captions.pace(bucket) for bucket in (low, low + 58, low + 59, high - 59, high)] == [0, 0, 1, 1, 2]
    for bucket in buckets:
        first, last = captions.pace_range(captions.PACES[captions.pace(bucket)])
        assert first <= bucket <= last
    assert [captions.ninth(point) for point in ((0, 0), (10.6, 10.7), (31.9, 15), (40, -3))] == [
        (0, 0), (1, 0), (1, 2), (0, 2),
    ]  # fmt: skip


def test_single_clips_repeat_and_have_one_sprite():
    specs = captions.single_clips(3, 40)
    assert specs == captions.single_clips(3, 50)[:40]
    assert all(len(spec.sprites) == 1 for spec in specs)


def test_a_word_is_a_token(pipeline):
    made = dit.make_tokenizer()
    for tokenizer in (made, pipeline.tokenizer):
        ids = dit.tokenize(tokenizer, [PROMPT])[0]
        assert tokenizer.convert_ids_to_tokens(ids) == [*(f"▁{word}" for word in PROMPT.split()), "</s>"]
        assert tokenizer("a giraffe").input_ids[1:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
        assert dit.empty_prompt(tokenizer).tolist() == [tokenizer.eos_token_id] + [0] * captions.NUM_WORDS
    with pytest.raises(ValueError, match="expected captions of 12 words, got 3"):
        dit.tokenize(made, ["a red fish"])


def test_training_embeds_prompts_as_the_pipeline_does(pipeline):
    denoiser = dit.TextDenoiser(dit.DiTConfig())
    denoiser.text_encoder = pipeline.text_encoder
    ids = torch.stack([dit.empty_prompt(pipeline.tokenizer), dit.tokenize(pipeline.tokenizer, [PROMPT])[0]])
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt(PROMPT, negative_prompt="", clean_caption=False)
        found = losses.embed_prompts(denoiser, ids)
    assert torch.allclose(found, torch.cat([negative, prompt]), atol=1e-5)


def _tiny_run(folder, pool, steps):
    torch.manual_seed(0)
    options = FitOptions(folder, seed=0, steps=steps, learning_rate=1e-3, decay_steps=1, evaluate_every=1)
    run = Run(dit.TextDenoiser(TINY), options)
    fit(run, functools.partial(train.dit_loss, pool=pool), functools.partial(train.evaluate_dit, pool=pool))
    return run


def test_a_resumed_run_is_bitwise_the_uncut_one(pipeline, tmp_path):
    pool = data.encode_captioned(pipeline.vae, captions.single_clips(0, 3))
    uncut = _tiny_run(tmp_path / "uncut", pool, steps=3)
    _tiny_run(tmp_path / "cut", pool, steps=2)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed = _tiny_run(tmp_path / "cut", pool, steps=3)
    assert resumed.step == uncut.step == 3
    for name, tensor in uncut.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    for first, second in zip(uncut.average.values, resumed.average.values, strict=True):
        assert torch.equal(first, second)


def test_a_pool_read_in_parts_is_the_one_that_was_encoded(pipeline, tmp_path):
    whole = data.encode_captioned(pipeline.vae, captions.single_clips(0, 3))
    for _ in range(2):  # encoded, then read
        parts = data.load_caption_pool(pipeline.vae, 0, 3, tmp_path, part_clips=2)
        assert torch.allclose(parts.latents, whole.latents, atol=1e-5)
        assert torch.equal(parts.token_ids, whole.token_ids)


def test_a_real_clip_is_read_as_what_it_is():
    for spec in captions.single_clips(5, 4):
        figures = reading.compare_with_words(sprites.render_clip(spec), spec)
        assert (figures["kind"], figures["colour"], figures["backdrop"], figures["heading"]) == (1, 1, 1, 1)
        assert figures["lost"] == 0
        assert figures["place_px"] < 0.5
        assert figures["speed_px"] < 0.1
        assert figures["psnr_db"] > 30


def test_another_clip_and_an_empty_one_are_not_what_was_asked_for():
    asked = _clip()
    other = _clip("beetle", "blue", start=(24.0, 24.0), heading=np.pi, backdrop="night", bucket=224)
    figures = reading.compare_with_words(sprites.render_clip(other), asked)
    assert (figures["kind"], figures["colour"], figures["backdrop"], figures["heading"]) == (0, 0, 0, 0)
    assert figures["place_px"] > 10
    assert figures["speed_px"] > 0.3
    empty = reading.compare_with_words(sprites.render_clip(replace(asked, sprites=())), asked)
    assert (empty["lost"], empty["kind"]) == (1, 0)


def test_a_seed_decides_the_clip(pipeline, plain_clip):
    assert plain_clip.shape == (sprites.NUM_FRAMES, 3, sprites.IMAGE_SIZE, sprites.IMAGE_SIZE)
    assert np.array_equal(plain_clip, _generate(pipeline))
    assert not np.array_equal(plain_clip, _generate(pipeline, seed=1))


def test_a_lossless_policy_changes_no_bit_and_a_cache_little(pipeline, plain_clip):
    """Every other step computes only the ends."""
    lossless = lc.transform_pipeline(pipeline, Policy())
    assert np.array_equal(_generate(lossless), plain_clip)
    cached = lc.transform_pipeline(pipeline, Policy(cache=Cache(cut=MIDDLE_BLOCKS, interval=2)))
    clip = _generate(cached)
    assert not np.array_equal(clip, plain_clip)
    assert psnr_db(clip, plain_clip) > 20


def test_transforming_the_transformer_alone_is_the_same(pipeline, plain_clip):
    original = pipeline.transformer
    try:
        pipeline.transformer = lc.transform(original, Policy())
        assert np.array_equal(_generate(pipeline), plain_clip)
    finally:
        pipeline.transformer = original
