"""``alignflow reward ...``: serve, calibrate, benchmark and train rewards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.cli.shared import ConfigArgument, Out, Overrides, Overwrite, Resume, stoppable, with_out, within_reach
from align.config.command_line import files_and_overrides
from align.runs.devices import chosen, require
from alignflow.errors import ConfigError
from alignflow.extras import optional
from alignflow.secrets import remember
from alignflow.terminal import echo
from alignflow.words import count

if TYPE_CHECKING:
    from align.preference.settings import JudgeTrainConfig, LatentTrainConfig, RewardTrainConfig

FORMATS = "pairs, hpdv2, hpdv3, image-reward, pick-a-pic, genai-bench, mj-bench, videogen-rewardbench, mmrb2"

app = typer.Typer(name="reward", help="Serve, calibrate, benchmark and train rewards.", no_args_is_help=True)

RewardArgument = Annotated[
    str, typer.Argument(metavar="REWARD", help="reward: a kind, {kind: ..., ...} or a .yaml file", show_default=False)
]


@app.command(epilog="Example: alignflow reward serve clip --port 8300 --token-env REWARD_TOKEN --host 0.0.0.0")
def serve(
    reward: RewardArgument,
    host: Annotated[
        str, typer.Option(help="address to listen on; addresses beyond this machine require a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port; 0 = any free port")] = 8300,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="environment variable with the token that clients must send")
    ] = None,
    device: Annotated[str, typer.Option(help="device: cpu, cuda, cuda:1 or mps")] = "cpu",
    chunk: Annotated[
        int, typer.Option(min=1, help="samples scored at a time when several requests arrive together")
    ] = 32,
    window: Annotated[float, typer.Option(min=0, help="seconds to wait for more requests before scoring")] = 0.01,
    max_size: Annotated[
        int, typer.Option(min=1, help="maximum size of a request in megabytes, packed and unpacked")
    ] = 512,
    max_samples: Annotated[int, typer.Option(min=1, help="maximum number of samples per request")] = 4096,
    max_pixels: Annotated[int, typer.Option(min=1, help="maximum number of pixels per image or frame")] = 1 << 22,
    max_total: Annotated[
        int, typer.Option(min=1, help="maximum number of pixels per request, over all images and frames")
    ] = 1 << 26,
    waiting: Annotated[
        int, typer.Option(min=1, help="maximum number of waiting requests; further requests are told to retry")
    ] = 256,
    arrival: Annotated[float, typer.Option(min=0.1, help="seconds within which a request must have arrived")] = 60.0,
    grace: Annotated[float, typer.Option(min=0, help="seconds to finish work in progress after SIGTERM")] = 10.0,
) -> None:
    """Serve a reward over HTTP, for kind: remote."""
    from align.config.load import load_reward

    settings = load_reward(reward)
    require(device, "--device")
    token = os.environ.get(token_env) if token_env else None
    remember(token)
    if token_env and not token:
        raise ConfigError(f"--token-env: environment variable {token_env} is not set")
    for package in ("fastapi", "uvicorn"):
        optional(package, "alignflow reward serve", ConfigError)
    from rewards.serving.limits import Limits
    from rewards.serving.server import serve as run

    limits = Limits(max_size << 20, max_samples, max_pixels, max_total, waiting, arrival=arrival)
    run(
        settings, host=host, port=port, token=token, device=device, batch=chunk, window=window, limits=limits,
        grace=grace, say=echo,
    )  # fmt: skip


@app.command(epilog="Example: alignflow reward calibrate clip samples/*.png --prompts-file prompts.txt --out clip.json")
def calibrate(
    reward: RewardArgument,
    files: Annotated[list[Path], typer.Argument(help="reference sample: images or videos", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="prompt; may be repeated")] = None,
    prompts_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="prompts: .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]")
    ] = None,
    out: Annotated[Path, typer.Option(help="output file for the statistics")] = Path("reference.json"),
) -> None:
    """Measure mean, standard deviation and quantiles of a reward on a reference sample, for reference: in a mixture."""
    from align.config.load import load_reward
    from align.data.prompts import Prompt, read_prompts

    settings = load_reward(reward)
    prompts = [Prompt(text) for text in prompt or ()] + (read_prompts(prompts_file) if prompts_file else [])
    import torch

    from align.data.files import write_text
    from align.evaluation.files import score_files
    from rewards.reference import measure

    scores = [row["scores"]["reward"] for row in score_files(files, prompts, {"reward": settings})]
    values = torch.tensor([torch.nan if value is None else value for value in scores])
    found = measure(values, settings.model_dump(mode="json"))
    write_text(out, found.model_dump_json(indent=2) + "\n")
    spread = f"mean {found.mean:.4g}, deviation {found.std:.4g}"
    echo(f"{out}: {spread} of {found.count} scores, {found.missing} missing")


@app.command(epilog="Example: alignflow reward bench pick_score hpdv2 HPDv2/test.json --media HPDv2/test --limit 100")
def bench(
    reward: RewardArgument,
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help=FORMATS, show_default=False)],
    source: Annotated[
        str, typer.Argument(metavar="SET", help=".json, .jsonl, .csv, .parquet or hub:owner/name[:split]")
    ],
    media: Annotated[
        Path | None, typer.Option(help="folder that the set's file names are relative to; default: the set's own")
    ] = None,
    judgement: Annotated[str, typer.Option(help="videogen-rewardbench only: Overall, VQ, MQ or TA")] = "",
    threshold: Annotated[float | None, typer.Option(min=0, help="largest score gap that counts as a tie")] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="SET", help="another split of the same format for tuning the threshold")
    ] = None,
    tune_on_test: Annotated[
        bool, typer.Option("--tune-on-test", help="tune the threshold on the test pairs; the report states this")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="maximum number of rows, counted from the first")] = None,
    draws: Annotated[
        int, typer.Option(min=100, help="number of bootstrap samples, each of whole rows of the set")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the bootstrap")] = 0,
    device: Annotated[str, typer.Option(help="device: cpu, cuda, cuda:1 or mps")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="output file for the report as JSON")] = None,
) -> None:
    """Measure how often a reward agrees with human preferences, on a published preference set."""
    from align.config.load import load_reward
    from align.preference.formats import read_set

    settings = load_reward(reward)
    require(device, "--device")
    pairs = read_set(kind, source, media=media, judgement=judgement, limit=limit)
    others = read_set(kind, validation, media=media, judgement=judgement) if validation else []
    from align.data.files import write_json
    from align.preference.bench import measure
    from align.preference.words import lines

    found = measure(
        settings.build(device).fixed(), pairs, threshold=threshold, validation=others, tune_on_test=tune_on_test,
        draws=draws, seed=seed, device=device,
    )  # fmt: skip
    about = {"reward": settings.model_dump(mode="json"), "format": kind, "set": source, "judgement": judgement}
    if out is not None:
        write_json(out, {**about, **found.model_dump(mode="json")})
    for line in lines(found):
        echo(line)


@app.command(
    epilog="Example: alignflow reward train configs/rewards/pairs.yaml head.kind=moe loss.kind=bt --out my/reward"
)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MORE.yaml|KEY=VALUE", help="configs merged over the first, then overrides such as fit.lr=1e-4"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the interrupted training of a reward")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the folder if it exists")] = False,
    out: Annotated[Path | None, typer.Option(help="folder to write")] = None,
) -> None:
    """Train a reward, a latent reward or a judge, whichever the config describes.

    A reward is trained on a table of preferences, for reward: {kind: trained, path: ...}. A latent reward is trained
    on noised latents of a generator, for latent_reward: of a search. A judge is a LoRA of a vision-language model,
    trained on a table of preferences, for judge: {model: ..., lora: ...}.
    """
    from align.config.any_command import load_for
    from align.preference import settings as kinds

    files, overrides = files_and_overrides(config, overrides)
    settings = within_reach(load_for("reward train", files, with_out(overrides, out)))
    if isinstance(settings, kinds.RewardTrainConfig):
        with stoppable("reward train", settings.run_dir, files, overrides, out):
            _train_reward(settings, resume, overwrite)
        return
    if resume:
        raise ConfigError(f"--resume is for training a reward; {settings.trains} is trained in one go")
    if isinstance(settings, kinds.LatentTrainConfig):
        _train_latent(settings, overwrite)
    else:
        assert isinstance(settings, kinds.JudgeTrainConfig)
        _train_judge(settings, overwrite)


@app.command(epilog="Example: alignflow reward reason configs/rewards/reason_grpo.yaml judge.lora=runs/cold")
def reason(
    config: ConfigArgument, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
    out: Out = None,
) -> None:  # fmt: skip
    """Train a judge that writes its verdict: on critiques (cold), on its correct replies (rejection), or by grpo."""
    from align.reasoning.settings import load_reasoning

    files, overrides = files_and_overrides(config, overrides)
    settings = within_reach(load_reasoning(files, with_out(overrides, out)))
    from align.reasoning.train import train_reasoner

    with stoppable("reward reason", settings.run_dir, files, overrides, out):
        say_accuracy(train_reasoner(settings, resume=resume, overwrite=overwrite, say=echo))
    echo(f'judge: {{model: "{settings.local.model}", lora: "{settings.run_dir}"}}')


@app.command(epilog="Example: alignflow reward users pairs.jsonl --shots 4 --out users.safetensors")
def users(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="pairs with a column user", show_default=False)],
    out: Annotated[Path, typer.Option(help="safetensors file to write")] = Path("users.safetensors"),
    shots: Annotated[int, typer.Option(min=1, help="number of pairs to read per user, from the first")] = 4,
    backbone: Annotated[str, typer.Option(help="CLIP that reads the pairs: shapes, a folder or a hub id")] = "shapes",
    reward: Annotated[
        str | None, typer.Option(help="folder of a trained reward whose head infers users, instead of the backbone")
    ] = None,
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1 or mps")] = "auto",
) -> None:
    """Write an embedding of every user in a table of pairs, for policy: {kind: users} of recipe ppd."""
    from align.preference.user_embeddings import embed_users, save_embeddings

    if out.exists():
        raise ConfigError(f"{out} exists; name another file with --out")
    found = embed_users(table, shots, backbone, reward, str(chosen(device)))
    save_embeddings(out, found)
    tokens, width = next(iter(found.values())).shape
    echo(f"{out}: {count(len(found), 'user')}, {count(tokens, 'token')} of {width} numbers each")


def _train_reward(settings: RewardTrainConfig, resume: bool, overwrite: bool) -> None:
    from align.preference.train import train_reward

    say_accuracy(train_reward(settings, resume=resume, overwrite=overwrite, say=echo))
    echo(f'reward: {{kind: trained, path: "{settings.run_dir}"}}')


def _train_latent(settings: LatentTrainConfig, overwrite: bool) -> None:
    from align.preference.latent import train_latent

    summary = train_latent(settings, overwrite=overwrite, say=echo)
    for t, found in (summary["after"] or {}).items():
        if found["low"] is not None:
            bounds = f"{found['low']:.1%} .. {found['high']:.1%}"
            echo(f"t {t}: {found['value']:.1%} of held-out pairs ranked right ({bounds})")
    echo(f"latent_reward: {settings.run_dir}")


def _train_judge(settings: JudgeTrainConfig, overwrite: bool) -> None:
    from align.preference.judge import train_judge

    say_accuracy(train_judge(settings, overwrite=overwrite, say=echo))
    echo(f'judge: {{model: "{settings.asking.judge.model}", lora: "{settings.run_dir}"}}')


def say_accuracy(summary: dict[str, Any]) -> None:
    """Measurements on held-out rows, before and after."""
    for name in ("before", "after"):
        if (found := summary[name]) is not None:
            said = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None)
            echo(f"held out {name:6} {said}")
