"""Cut-outs and photographs from unpacked packages of Debian, sorted for `compose_pictures.py`.

`make stamps` fetches the packages and calls this. It writes

    OUTPUT/sprites/{animal,food,vehicle}/*.png    cut-outs with transparency
    OUTPUT/backgrounds/*                          photographs without animals, food or vehicles
    OUTPUT/sky_and_sea/*.png                      crops of photographs: sky, sea, lakes
    OUTPUT/licences/*                             authors and licences, as the packages name them

    python examples/choose_stamps.py PACKAGES OUTPUT

PACKAGES has one folder for each package, with what `dpkg -x` leaves in it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
MATE = "mate-backgrounds/usr/share/backgrounds/mate/nature"
PLASMA = "plasma-workspace-wallpapers/usr/share/wallpapers"
LOMIRI = "lomiri-wallpapers-16.04/usr/share/backgrounds"
PACKAGES = [name.partition("/")[0] for name in (STAMPS, MATE, PLASMA, LOMIRI)]

# Folders of stamps that make a class, whole.
CLASSES = {
    "animal": ["animals"],
    "food": ["food/fruit", "food/nuts", "food/spices", "food/vegetables"],
    "vehicle": ["vehicles", "military/vehicles"],
}
# Photographs only, and of each once: no drawings, no toys, no copy that is only mirrored.
LEFT_OUT_FOLDERS = {"cartoon", "toys"}
LEFT_OUT = {
    *("hedgehog", "echidna", "coraltrout", "shrimp"),  # drawn, or nearly without contrast
    *("7spoke256", "wheel_tractor", "trainSign"),  # parts of vehicles, and a sign
    *("sedan_police", "fire_engine", "terex", "eddieCopter"),  # drawn, or hardly there
}
BACKGROUNDS = [
    *(f"{MATE}/{name}.jpg" for name in ("Aqua", "Blinds", "Dune", "FreshFlower", "Garden")),
    *(f"{MATE}/{name}.jpg" for name in ("GreenMeadow", "RainDrops", "Storm", "TwoWings")),
    *(f"{MATE}/{name}.jpg" for name in ("Wood", "YellowFlower")),
    *(f"{PLASMA}/{name}" for name in ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour")),
    *(f"{PLASMA}/{name}" for name in ("EveningGlow", "FallenLeaf", "Grey", "Kite")),
    *(f"{PLASMA}/{name}" for name in ("OneStandsOut", "Path", "summer_1am")),
    *(f"{LOMIRI}/{name}.jpg" for name in ("Bridge_by_Sander_Klootwijk", "Picture_1A_by_freespace")),
    *(f"{LOMIRI}/{name}_by_Aitzol_Berasategi.jpg" for name in ("aitzgorri", "life", "sunset")),
    f"{LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg",
    f"{LOMIRI}/greentock_by_Peter_Nerlich.jpg",
    f"{LOMIRI}/seeding_by_Clements_Engelhardt.jpg",
]
# left, top, right, bottom as shares of width and height
SKY_AND_SEA = {
    f"{MATE}/Storm.jpg": (0, 0, 1, 0.6),
    f"{PLASMA}/BytheWater": (0, 0, 1, 0.33),
    f"{PLASMA}/ColdRipple": (0, 0, 1, 0.55),
    f"{PLASMA}/DarkestHour": (0, 0, 1, 1),
    f"{PLASMA}/EveningGlow": (0, 0, 1, 0.4),
    f"{PLASMA}/Kite": (0, 0, 0.6, 1),
    f"{PLASMA}/summer_1am": (0, 0, 1, 1),
    f"{LOMIRI}/Bridge_by_Sander_Klootwijk.jpg": (0, 0, 1, 1),
    f"{LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg": (0, 0, 0.6, 0.4),
    f"{LOMIRI}/sunset_by_Aitzol_Berasategi.jpg": (0, 0, 1, 0.4),
}


def picture_file(place: Path) -> Path:
    """`place`, or the largest picture of a wallpaper that Plasma keeps in a folder."""
    if place.is_file():
        return place
    sizes = sorted(place.glob("contents/images/*x*.*"), key=lambda file: file.stat().st_size)
    if not sizes:
        raise SystemExit(f"error: {place} is not there: is its package unpacked as dpkg -x does?")
    return sizes[-1]


def chosen_sprites(packages: Path) -> dict[str, list[Path]]:
    """The cut-outs of each class, sorted by name."""
    chosen = {}
    for name, folders in CLASSES.items():
        files = [file for folder in folders for file in (packages / STAMPS / folder).rglob("*.png")]
        chosen[name] = sorted(
            file
            for file in files
            if not LEFT_OUT_FOLDERS.intersection(file.parts)
            and file.stem not in LEFT_OUT
            and not file.stem.endswith("_mirror")
        )
        if not chosen[name]:
            raise SystemExit(f"error: no stamps of class {name} in {packages / STAMPS}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", type=Path, help="one folder for each unpacked package")
    parser.add_argument("output", type=Path, help="a new folder")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"output: {args.output} exists; name a new folder, or delete it first")
    missing = [name for name in PACKAGES if not (args.packages / name).is_dir()]
    if missing:
        parser.error(f"packages: {args.packages} lacks {', '.join(missing)}; see `make stamps`")
    sprites = chosen_sprites(args.packages)
    backgrounds = {place: picture_file(args.packages / place) for place in BACKGROUNDS}
    sky_and_sea = {place: picture_file(args.packages / place) for place in SKY_AND_SEA}

    for name, files in sprites.items():
        folder = args.output / "sprites" / name
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / file.name)
    for folder_name in ("backgrounds", "sky_and_sea", "licences"):
        (args.output / folder_name).mkdir()
    for place, file in backgrounds.items():
        shutil.copy(file, args.output / "backgrounds" / (Path(place).stem + file.suffix))
    for place, file in sky_and_sea.items():
        crop(file, SKY_AND_SEA[place], args.output / "sky_and_sea" / (Path(place).stem + ".png"))
    for name in PACKAGES:
        licence = args.packages / name / "usr/share/doc" / name / "copyright"
        shutil.copy(licence, args.output / "licences" / f"{name}.txt")
    for place in {*BACKGROUNDS, *SKY_AND_SEA}:
        for file in (args.packages / place).glob("metadata.*"):  # Plasma names the authors there
            shutil.copy(file, args.output / "licences" / f"{Path(place).name}{file.suffix}")
    counts = ", ".join(f"{len(files)} of {name}" for name, files in sprites.items())
    print(f"{args.output}: cut-outs: {counts}; {len(backgrounds)} photographs, ", end="")
    print(f"{len(sky_and_sea)} of sky and sea")


def crop(file: Path, box: tuple[float, float, float, float], output: Path) -> None:
    from PIL import Image

    with Image.open(file) as picture:
        width, height = picture.size
        left, top, right, bottom = box
        pixels = (left * width, top * height, right * width, bottom * height)
        picture.crop(tuple(map(round, pixels))).convert("RGB").save(output)


if __name__ == "__main__":
    main()
