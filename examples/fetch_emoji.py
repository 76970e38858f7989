"""Emoji of four drawers as class folders: three drawers to train on, the fourth to test on.

    python examples/fetch_emoji.py data/emoji                    # `make emoji`
    python examples/fetch_emoji.py data/emoji --test noto        # another one to test on

It downloads four packages of npm (246 MB; only Python is needed, no npm), each of one version and
compared with its SHA-512, and writes

    OUTPUT/train/GROUP/DRAWER-CODE.png    64 x 64 pixels, on white
    OUTPUT/val/GROUP/DRAWER-CODE.png      the drawer that is tested on
    OUTPUT/sources.json                   packages, digests, counts, versions
    OUTPUT/licences/                      the licence files that the packages bring

An emoji is taken if all four drawers have it. Its group, the class, is that of Unicode, as
emoji-datasource names it. Left out are skin tones, and the flags: the fourth package has Noto's.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import tarfile
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL import __version__ as pillow_version

REGISTRY = "https://registry.npmjs.org"
SIDE = 64
LEFT_OUT = ("Flags", "Component")  # "Component": skin tones alone
NO_PART = ("fe0f", "200d")  # variant selector and joiner, which some packages leave out


@dataclass(frozen=True)
class Package:
    """A package of npm that holds the pictures of one drawer.

    Attributes:
        name, version: of the package.
        sha512: of its file, in base64 as the registry states it.
        pictures: the folder of its pictures, whose names are code points.
        licence: of the pictures, not of the package's code.
    """

    name: str
    version: str
    sha512: str
    pictures: str
    licence: str

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def address(self) -> str:
        """Where its file is."""
        return f"{REGISTRY}/{self.name}/-/{self.file}"


PACKAGES = {
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64",
        "SIL OFL 1.1 or Apache 2.0 (Google, Noto Emoji)",
    ),
    "twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64",
        "CC-BY 4.0 (Twitter and contributors, Twemoji)",
    ),
    "emojione": Package(
        "emojione",
        "2.2.7",
        "Gbf8qysc34+TFUS5HPwOUY62v8gjLuPmfVTWUR/zirULSYUe/D3MrvYo0W5Y2gScF1YI7EBe5t81IbD8q144Ag==",
        "package/assets/png",
        "CC-BY 4.0 (EmojiOne 2)",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets",
        "MIT (Microsoft, Fluent Emoji)",
    ),
}
GROUPS = ("noto", "package/emoji.json")  # which package names the groups, and in which file


def code_of(name: str) -> str:
    """Code points in the form in which packages agree: `1F469-200D-1F373` is `1f469-1f373`."""
    parts = [part.lstrip("0") for part in name.lower().split("-")]
    return "-".join(part for part in parts if part not in NO_PART)


# -- packages -----------------------------------------------------------------------------------


def download(package: Package, folder: Path) -> Path:
    """The file of a package, downloaded if it is not there yet.

    Raises:
        SystemExit: it cannot be had, or is not the file that was expected.
    """
    path = folder / package.file
    if not path.is_file():
        print(f"{package.address}", flush=True)
        fresh = path.with_name(f"{path.name}.new")
        try:
            answer = urllib.request.urlopen(package.address, timeout=60)
            with answer, fresh.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise SystemExit(
                f"error: {package.address} cannot be downloaded to {fresh}: {error}; without a "
                f"network, put {package.file} into a folder and name it with --packages"
            ) from error
        fresh.replace(path)
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise SystemExit(
            f"error: {path} has the SHA-512 {found}, expected {package.sha512} of {package.name} "
            f"{package.version}; delete the file to download it again"
        )
    return path


def read_package(path: Path, package: Package, licences: Path) -> tuple[dict[str, bytes], bytes]:
    """The pictures of a package by code, and its file of groups if it is the one that has it.

    Licence files go to the folder `licences`.
    """
    pictures: dict[str, bytes] = {}
    groups = b""
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            wanted = folder == package.pictures or member.name == GROUPS[1]
            licence = re.match(r"(licen[cs]e|readme)", name, re.IGNORECASE) and folder == "package"
            if not member.isfile() or not (wanted or licence):
                continue
            file = archive.extractfile(member)
            content = b"" if file is None else file.read()
            if licence:
                (licences / f"{package.file}-{name}").write_bytes(content)
            elif member.name == GROUPS[1]:
                groups = content
            else:
                pictures[code_of(Path(name).stem)] = content
    return pictures, groups


# -- pictures -----------------------------------------------------------------------------------


def common_emoji(groups: list[dict], drawn: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """The group of each emoji that every drawer has, by code; of `groups`, emoji-datasource's list.

    Raises:
        SystemExit: there is none.
    """
    found = {code_of(entry["unified"]): entry["category"] for entry in groups}
    chosen = {
        code: group
        for code, group in sorted(found.items())
        if group not in LEFT_OUT and all(code in pictures for pictures in drawn.values())
    }
    if not chosen:
        raise SystemExit("error: no emoji is in all packages: their layout is not the expected one")
    return chosen


def on_white(content: bytes) -> Image.Image:
    """A picture of `SIDE` x `SIDE` pixels, its transparent parts white."""
    with Image.open(io.BytesIO(content)) as picture:
        rgba = picture.convert("RGBA")
    if rgba.size != (SIDE, SIDE):
        rgba = rgba.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def folder_name(group: str) -> str:
    """`Smileys & Emotion` is `smileys-emotion`."""
    return re.sub(r"[^a-z]+", "-", group.lower())


def write_pictures(
    output: Path, drawn: dict[str, dict[str, bytes]], chosen: dict[str, str], test: str
) -> None:
    """The folders `train` and `val` of `output`."""
    for drawer, pictures in drawn.items():
        split = output / ("val" if drawer == test else "train")
        for code, group in chosen.items():
            folder = split / folder_name(group)
            folder.mkdir(parents=True, exist_ok=True)
            on_white(pictures[code]).save(folder / f"{drawer}-{code}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--test", choices=list(PACKAGES), default="fluent", help="tested on")
    parser.add_argument("--packages", type=Path, help="keep the packages here, and use those there")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"output: {args.output} exists; name a new folder, or delete it first")
    work = args.output.with_name(f".new.{args.output.name}")
    shutil.rmtree(work, ignore_errors=True)
    (work / "licences").mkdir(parents=True)
    packages = args.packages or work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, dict[str, bytes]] = {}
    groups = b""
    for drawer, package in PACKAGES.items():
        path = download(package, packages)
        drawn[drawer], found = read_package(path, package, work / "licences")
        groups = found if drawer == GROUPS[0] else groups
    chosen = common_emoji(json.loads(groups), drawn)
    write_pictures(work, drawn, chosen, args.test)
    sources = {
        "packages": {drawer: asdict(package) for drawer, package in PACKAGES.items()},
        "test": args.test,
        "emoji": len(chosen),
        "groups": dict(sorted(Counter(map(folder_name, chosen.values())).items())),
        "pillow": pillow_version,
    }
    (work / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    shutil.rmtree(work / "packages", ignore_errors=True)
    work.rename(args.output)
    trained = ", ".join(drawer for drawer in drawn if drawer != args.test)
    print(
        f"{args.output}: {len(chosen)} emoji in {len(sources['groups'])} groups, each drawn by "
        f"{trained} (train) and {args.test} (val)"
    )


if __name__ == "__main__":
    main()
