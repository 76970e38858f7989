"""Pictures with known objects: cut-outs with transparency pasted on photographs.

    make stamps
    python examples/compose_pictures.py --sprites data/stamps/sprites \
        --backgrounds data/stamps/backgrounds --classes animal food --output data/composites

writes pictures of a training and a held-out part, the masks of their objects as COCO's JSON, their
label maps, the names of the classes, and `preview.png` to look at. No cut-out, none of its kind
(`lion.png` and `lion-2.png` are of one kind) and no photograph is in both parts. The same files,
options and versions of Pillow and NumPy give the same bytes.

`--small_targets` writes pictures of one channel instead, where objects are a few bright pixels, in
the layout of the data set IRSTD-1K. docs/composed_pictures.md has the layouts and the licences.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Array = np.ndarray
Rng = np.random.Generator

LARGEST_SPRITE = 320  # pixels of the longer side that are kept of a cut-out
LARGEST_BACKGROUND = 1024  # pixels of the shorter side that are kept of a photograph
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PALETTE = [(0, 0, 0), (230, 60, 40), (60, 170, 60), (60, 100, 240), (240, 200, 40), (180, 60, 200)]
PREVIEW = (4, 8)  # rows and columns of each part in preview.png
TRIES = 20  # places tried for an object before it is left out


class Sprite(NamedTuple):
    label: int  # 1 is the first class, 0 is the background
    pixels: Image.Image  # RGBA, cropped to what is not transparent


class Object(NamedTuple):
    label: int
    mask: Array  # bool [H, W]: where it is seen


@dataclass(frozen=True)
class Part:
    """What the pictures of one part are made of."""

    name: str
    number: int  # seeds its pictures
    sprites: tuple[tuple[Sprite, ...], ...]  # of each class
    backgrounds: tuple[Image.Image, ...]  # RGB
    sources: dict[str, Any]  # file names


# -- material -----------------------------------------------------------------------------------


def kind(path: Path) -> str:
    """The first word of a file's name: "lion" of `Lion-2.png`, "apple" of `apples_red.png`."""
    words = re.findall(r"[^\W\d_]+", path.stem.lower())
    return words[0].rstrip("s") if words else path.stem


def split(kinds: list[str], held_out: float, rng: Rng) -> set[str]:
    """The kinds of the held-out part: `held_out` of all, at least one, never all."""
    kinds = sorted(set(kinds))
    count = min(max(round(held_out * len(kinds)), 1), len(kinds) - 1)
    return {kinds[index] for index in rng.permutation(len(kinds))[:count]}


def read_sprite(path: Path, label: int) -> Sprite:
    with Image.open(path) as picture:
        pixels = picture.convert("RGBA")
    alpha = pixels.getchannel("A")
    if alpha.getextrema()[0] == 255:
        raise ValueError(f"--sprites: {path} has no transparent pixel, so it is no cut-out")
    box = alpha.point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None:
        raise ValueError(f"--sprites: {path} is transparent everywhere")
    pixels = pixels.crop(box)
    pixels.thumbnail((LARGEST_SPRITE, LARGEST_SPRITE), Image.Resampling.LANCZOS)
    return Sprite(label, pixels)


def read_background(path: Path, img_size: int) -> Image.Image:
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    short = min(pixels.size)
    if short < img_size:
        raise ValueError(
            f"--backgrounds: {path} has {pixels.width} x {pixels.height} pixels; "
            f"expected at least --img_size, {img_size}, in both directions"
        )
    if short > LARGEST_BACKGROUND:
        width, height = (round(side * LARGEST_BACKGROUND / short) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return pixels


def picture_files(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{option}: {folder} is no folder; `make stamps` makes data/stamps")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise ValueError(
            f"{option}: {len(files)} pictures ({', '.join(PICTURES)}) in {folder}; expected at "
            "least two, as the held-out part has none of those of the training part"
        )
    return files


def read_parts(args: argparse.Namespace, names: tuple[str, str]) -> list[Part]:
    """The material of the training and of the held-out part, which share no kind of cut-out."""
    rng = np.random.default_rng([args.seed, 0])
    files: list[list[Path]] = []
    for name in args.classes:
        found = picture_files(args.sprites / name, "--sprites")
        if len({kind(file) for file in found}) < 2:
            raise ValueError(
                f"--sprites: all cut-outs in {args.sprites / name} are of the kind "
                f"{kind(found[0])!r}, the first word of their names; expected two kinds or more"
            )
        files.append(found)
    held_out = [split([kind(file) for file in found], args.held_out, rng) for found in files]
    photographs = picture_files(args.backgrounds, "--backgrounds")
    unseen = split([file.name for file in photographs], args.held_out, rng)

    parts = []
    for number, name in enumerate(names):
        wanted = bool(number)
        sprites = [
            [file for file in found if (kind(file) in apart) == wanted]
            for found, apart in zip(files, held_out)
        ]
        backgrounds = [file for file in photographs if (file.name in unseen) == wanted]
        parts.append(
            Part(
                name=name,
                number=number,
                sprites=tuple(
                    tuple(read_sprite(file, label) for file in found)
                    for label, found in enumerate(sprites, 1)
                ),
                backgrounds=tuple(read_background(file, args.img_size) for file in backgrounds),
                sources={
                    "sprites": {
                        name: [file.relative_to(args.sprites).as_posix() for file in found]
                        for name, found in zip(args.classes, sprites)
                    },
                    "backgrounds": [
                        file.relative_to(args.backgrounds).as_posix() for file in backgrounds
                    ],
                },
            )
        )
    return parts


# -- one picture --------------------------------------------------------------------------------


def random_crop(background: Image.Image, size: int, share: tuple[float, float], rng: Rng) -> Array:
    """A square of the photograph, `share` of its shorter side, flipped or not: uint8 [S, S, 3]."""
    side = max(rng.uniform(*share) * min(background.size), min(size, *background.size))
    left = rng.uniform(0, background.width - side)
    top = rng.uniform(0, background.height - side)
    box = (left, top, left + side, top + side)
    crop = np.asarray(background.resize((size, size), Image.Resampling.LANCZOS, box=box))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def brighter(pixels: Array, rng: Rng) -> Array:
    """Brightness and contrast changed by up to a quarter, float32 in 0..255."""
    gain, contrast = rng.uniform(0.75, 1.25, 2)
    middle = pixels.mean()
    return ((pixels.astype(np.float32) - middle) * contrast + middle).clip(0, 255) * gain


def turned(sprite: Image.Image, length: float, rng: Rng) -> Image.Image:
    """The cut-out flipped or not, up to 15 degrees turned, its longer side `length` pixels."""
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = length / max(sprite.size)
    width, height = (max(round(side * scale), 1) for side in sprite.size)
    sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    return sprite.crop(sprite.getchannel("A").getbbox())


def on_canvas(sprite: Image.Image, size: int, rng: Rng) -> Array:
    """The cut-out at a random place, at most a tenth of it outside: float32 [S, S, 4]."""
    canvas = Image.new("RGBA", (size, size))
    places = []
    for side in sprite.size:
        low, high = -0.1 * side, size - 0.9 * side
        places.append(round(rng.uniform(min(low, high), max(low, high))))
    canvas.paste(sprite, (places[0], places[1]))
    return np.asarray(canvas).astype(np.float32)


def compose(part: Part, index: int, args: argparse.Namespace) -> tuple[Array, list[Object]]:
    """Picture `index` of a part: uint8 [S, S, 3], and its objects, those in front last."""
    rng = np.random.default_rng([args.seed, 1, part.number, index])
    background = part.backgrounds[rng.integers(len(part.backgrounds))]
    picture = brighter(random_crop(background, args.img_size, (0.3, 1.0), rng), rng)
    objects: list[Object] = []
    areas: list[float] = []  # of each object if nothing were in front
    for _ in range(rng.integers(args.objects[0], args.objects[1] + 1)):
        sprites = part.sprites[rng.integers(len(part.sprites))]
        sprite = sprites[rng.integers(len(sprites))]
        length = rng.uniform(*args.sprite_size) * args.img_size
        pixels = turned(sprite.pixels, length, rng)
        for _ in range(TRIES):
            placed = on_canvas(pixels, args.img_size, rng)
            mask = placed[..., 3] >= 128
            seen = [(one.mask & ~mask).sum() for one in objects]
            if mask.any() and all(n >= args.min_seen * area for n, area in zip(seen, areas)):
                break
        else:
            continue
        objects = [Object(one.label, one.mask & ~mask) for one in objects]
        objects.append(Object(sprite.label, mask))
        areas.append(mask.sum())
        alpha = placed[..., 3:] / 255
        picture = picture * (1 - alpha) + brighter(placed[..., :3], rng) * alpha
    return picture.round().clip(0, 255).astype(np.uint8), objects


def compose_small(part: Part, index: int, args: argparse.Namespace) -> tuple[Array, list[Object]]:
    """Picture `index` with small bright targets, uint8 [S, S], and the targets."""
    rng = np.random.default_rng([args.seed, 2, part.number, index])
    background = part.backgrounds[rng.integers(len(part.backgrounds))]
    crop = random_crop(background, args.img_size, (0.3, 0.9), rng)
    picture = crop @ np.array([0.299, 0.587, 0.114]) * rng.uniform(0.5, 1)
    picture += rng.normal(0, rng.uniform(1, 4), picture.shape)
    every = [sprite for sprites in part.sprites for sprite in sprites]
    objects: list[Object] = []
    near = np.zeros(picture.shape, bool)  # where no target may begin
    for _ in range(rng.integers(args.objects[0], args.objects[1] + 1)):
        for _ in range(TRIES):
            sprite = every[rng.integers(len(every))]
            small = turned(sprite.pixels, rng.uniform(*args.target_size), rng)
            pixels = np.asarray(small).astype(np.float32)
            alpha = pixels[..., 3] / 255
            shape = alpha >= 0.5
            height, width = shape.shape
            top, left = (int(rng.integers(1, args.img_size - side)) for side in shape.shape)
            place = (slice(top, top + height), slice(left, left + width))
            if shape.sum() >= 3 and not near[place].any():
                break
        else:
            continue
        grey = pixels[..., :3] @ np.array([0.299, 0.587, 0.114]) / 255
        contrast = rng.uniform(*args.contrast)
        picture[place] += alpha * (0.6 + 0.4 * grey) * contrast
        mask = np.zeros(picture.shape, bool)
        mask[place] = shape
        objects.append(Object(1, mask))
        near[max(top - 8, 0) : top + height + 8, max(left - 8, 0) : left + width + 8] = True
    return picture.round().clip(0, 255).astype(np.uint8), objects


# -- files --------------------------------------------------------------------------------------


def run_lengths(mask: Array) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: lengths of runs of 0 and 1 in turns, 0 first, column by column."""
    flat = mask.flatten(order="F").astype(np.int8)
    borders = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    counts = np.diff(borders, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": counts}


def bounding_box(mask: Array) -> list[int]:
    """x, y, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def label_map(objects: list[Object], size: int) -> Array:
    labels = np.zeros((size, size), np.uint8)
    for one in objects:
        labels[one.mask] = one.label
    return labels


def palette() -> list[int]:
    return [value for colour in PALETTE for value in colour]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n")


def write_composites(folder: Path, parts: list[Part], args: argparse.Namespace) -> None:
    (folder / "annotations").mkdir()
    (folder / "classes.txt").write_text("\n".join(["background", *args.classes]) + "\n")
    for part, count in zip(parts, (args.train, args.val)):
        for kind_of_file in ("images", "labels"):
            (folder / kind_of_file / part.name).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            picture, objects = compose(part, index, args)
            name = f"{index:05d}.png"
            Image.fromarray(picture).save(folder / "images" / part.name / name)
            labels = Image.fromarray(label_map(objects, args.img_size))
            labels.putpalette(palette())
            labels.save(folder / "labels" / part.name / name)
            size = {"height": args.img_size, "width": args.img_size}
            images.append({"id": index + 1, "file_name": name, **size})
            for one in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": one.label,
                        "bbox": bounding_box(one.mask),
                        "area": int(one.mask.sum()),
                        "iscrowd": 0,
                        "segmentation": run_lengths(one.mask),
                    }
                )
        categories = [{"id": n, "name": name} for n, name in enumerate(args.classes, 1)]
        write_json(
            folder / "annotations" / f"instances_{part.name}.json",
            {"images": images, "annotations": annotations, "categories": categories},
        )
        print(f"{part.name}: {count} pictures, {len(annotations)} objects")


def write_small_targets(folder: Path, parts: list[Part], args: argparse.Namespace) -> None:
    for name in ("images", "masks", "img_idx"):
        (folder / name).mkdir()
    for part, count in zip(parts, (args.train, args.val)):
        names, number = [], 0
        for index in range(count):
            picture, objects = compose_small(part, index, args)
            name = f"{part.name}_{index:05d}"
            Image.fromarray(picture).save(folder / "images" / f"{name}.png")
            mask = label_map(objects, args.img_size) * 255
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            names.append(name)
            number += len(objects)
        text = "\n".join(names) + "\n"
        (folder / "img_idx" / f"{part.name}_{args.output.name}.txt").write_text(text)
        print(f"{part.name}: {count} pictures, {number} targets")


def write_preview(folder: Path, parts: list[Part], args: argparse.Namespace) -> None:
    """The first pictures of both parts, the borders of their objects in the colours of classes."""
    rows, columns = PREVIEW
    step = args.img_size + 2
    sheet = np.full((len(parts) * rows * step + 8, columns * step, 3), 255, np.uint8)
    for part, count in zip(parts, (args.train, args.val)):
        for index in range(min(count, rows * columns)):
            make = compose_small if args.small_targets else compose
            picture, objects = make(part, index, args)
            shown = np.broadcast_to(
                picture.reshape(*picture.shape[:2], -1), (*picture.shape[:2], 3)
            )
            shown = shown.copy()
            for one in objects:
                shown[border(one.mask)] = PALETTE[one.label % len(PALETTE)]
            row, column = divmod(index, columns)
            top = (part.number * rows + row) * step + 8 * part.number
            sheet[top : top + args.img_size, column * step : column * step + args.img_size] = shown
    Image.fromarray(sheet).save(folder / "preview.png")


def border(mask: Array) -> Array:
    """Positions just outside of a mask."""
    grown = np.pad(mask, 1)
    grown = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
    return grown & ~mask


# -- command line -------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sprites", type=Path, required=True, help="a folder of cut-outs for each class")
    add("--backgrounds", type=Path, required=True, help="a folder of photographs")
    add("--output", type=Path, required=True, help="a new folder")
    add("--classes", nargs="+", metavar="NAME", help="folders of --sprites; default: all, by name")
    add("--train", type=int, default=800, help="training pictures")
    add("--val", type=int, default=200, help="held-out pictures")
    add("--held_out", type=float, default=0.25, help="share of the material for the held-out part")
    add("--img_size", type=int, default=128, help="side of the pictures, in pixels")
    add("--objects", type=int, nargs=2, default=(1, 3), help="fewest and most in a picture")
    add(
        "--sprite_size",
        type=float,
        nargs=2,
        default=(0.35, 0.8),
        help="longer side of a cut-out, as a share of the picture's, from and to",
    )
    add("--min_seen", type=float, default=0.5, help="share of an object that others leave to see")
    add("--small_targets", action="store_true", help="one channel, targets of a few bright pixels")
    add("--target_size", type=float, nargs=2, default=(3.0, 10.0), help="their longer side, pixels")
    add("--contrast", type=float, nargs=2, default=(25.0, 100.0), help="how much brighter, of 255")
    add("--seed", type=int, default=0)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be, before anything is read or written."""
    if args.output.exists():
        raise ValueError(f"--output: {args.output} exists; name a new folder, or delete it first")
    for name in ("train", "val"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.img_size < 32:
        raise ValueError(f"--img_size {args.img_size}: expected 32 or more")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held_out {args.held_out}: expected a share between 0 and 1")
    if not 0 <= args.min_seen <= 1:
        raise ValueError(f"--min_seen {args.min_seen}: expected a share from 0 to 1")
    limits = {"objects": (0, 100), "sprite_size": (0.02, 1), "contrast": (1, 255)}
    limits["target_size"] = (2, args.img_size / 4)
    for name, (lowest, highest) in limits.items():
        low, high = getattr(args, name)
        if not lowest <= low <= high <= highest:
            raise ValueError(
                f"--{name} {low} {high}: expected two numbers from {lowest} to {highest}, "
                "the smaller one first"
            )
    if args.classes is None and args.sprites.is_dir():
        args.classes = sorted(folder.name for folder in args.sprites.iterdir() if folder.is_dir())
    if not args.classes:
        raise ValueError(
            f"--sprites: {args.sprites} has no folders; expected one of cut-outs for each class; "
            "`make stamps` makes data/stamps/sprites"
        )
    if len(args.classes) != len(set(args.classes)) or len(args.classes) > 254:
        raise ValueError(f"--classes {' '.join(args.classes)}: expected 1 to 254 different names")


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    args = parser.parse_args(arguments)
    names = ("train", "test") if args.small_targets else ("train", "val")
    try:
        check(args)
        parts = read_parts(args, names)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    folder = args.output.with_name(f".new.{args.output.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write = write_small_targets if args.small_targets else write_composites
    write(folder, parts, args)
    write_preview(folder, parts, args)
    given = {
        name: value for name, value in vars(args).items() if not isinstance(value, Path)
    }  # where the material lies does not matter
    sources = {part.name: part.sources for part in parts}
    text = json.dumps({"options": given, "sources": sources}, indent=1)
    (folder / "sources.json").write_text(text + "\n")
    folder.rename(args.output)
    print(f"wrote {args.output}; look at {args.output / 'preview.png'}")


if __name__ == "__main__":
    main()
