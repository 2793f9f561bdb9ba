#!/usr/bin/env bash
# What PyAV says of the orientation of a frame is not all of it.
#
# PyAV 18.1.0 with FFmpeg 8.1. (1) frame.rotation of a mirrored video is that of a turn: 0 for one
# that is upside down and mirrored by its display matrix (vflip), 180 for one mirrored left to right
# (hflip). The matrix itself, frame.side_data["DISPLAYMATRIX"], tells them apart. (2) side_data raises
# ValueError on frames that carry EXIF, a kind of side data newer than PyAV's list, so the matrix
# cannot be read then; Pillow reads such pictures.
#
# Output seen:
#   vflip: rotation 0, matrix 1 0 0 -1
#   hflip: rotation -180, matrix -1 0 0 1
#   JPEG with EXIF: ValueError: 31 is not a valid Type
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.3.5 pillow==12.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import struct

import av
import numpy as np
from PIL import Image

image = np.zeros((64, 96, 3), np.uint8)
for name, flips in (("vflip", {"vflip": True}), ("hflip", {"hflip": True})):
    with av.open("clip.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(0, **flips)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    with av.open("clip.mp4") as file:
        frame = next(file.decode(video=0))
    matrix = bytes(frame.side_data["DISPLAYMATRIX"])
    a, b, _, c, d = (value >> 16 for value in struct.unpack_from("5i", matrix))
    print(f"{name}: rotation {frame.rotation}, matrix {a} {b} {c} {d}")
    assert (abs(frame.rotation), a, b, c, d) == {
        "vflip": (0, 1, 0, 0, -1), "hflip": (180, -1, 0, 0, 1)
    }[name]
exif = Image.Exif()
exif[0x112] = 6
Image.fromarray(image).save("photo.jpg", exif=exif)
with av.open("photo.jpg") as file:
    frame = next(file.decode(video=0))
try:
    frame.side_data
    raise SystemExit("JPEG with EXIF: side_data can be read")
except ValueError as error:
    print(f"JPEG with EXIF: ValueError: {error}")
PYTHON
