#!/usr/bin/env bash
# A decoder can keep the first skip_frame that it was given.
#
# PyAV 18.1.0 with FFmpeg 8.1. codec_context.skip_frame = "NONREF" leaves out frames that no other
# frame refers to. H.264's decoder follows it packet by packet: set it before packets whose frames
# are not needed, set it back to "DEFAULT", and all later frames come. AV1's (libdav1d) reads it once,
# when it is opened, and goes on leaving out frames: without an error, in a clip that seems shorter.
#
# Output seen (of the last 24 of 48 frames, after skip_frame was set back):
#   h264      24
#   libdav1d  14
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.3.5
cd "$folder"
SVT_LOG=0 "$folder/venv/bin/python" - <<'PYTHON'
import av
import numpy as np

found = {}
for codec, options in (("libx264", {"bf": "3"}), ("libsvtav1", {"preset": "12"})):
    with av.open("clip.mp4", "w") as file:
        stream = file.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(48):
            image = np.zeros((64, 96, 3), np.uint8)
            image[:, i : 2 * i + 1] = 200
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    with av.open("clip.mp4") as file:
        stream, times = file.streams.video[0], []
        context = stream.codec_context
        context.thread_count = 1
        half = stream.duration // 2
        for packet in file.demux(stream):
            early = packet.pts is not None and packet.pts < half
            context.skip_frame = "NONREF" if early else "DEFAULT"
            times += [frame.pts for frame in packet.decode()]
    found[context.name] = sum(time >= half for time in times)
    print(f"{context.name:9} {found[context.name]}")
assert found["h264"] == 24
assert found["libdav1d"] < 24
PYTHON
