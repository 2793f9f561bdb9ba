#!/usr/bin/env bash
# The times of packets are not the times of frames.
#
# PyAV 18.1.0 with FFmpeg 8.1: H.264 with B-frames in AVI, which has no field for presentation times.
# Packets come with times in the order of decoding, so a reader that sorts packets by time, or picks
# frames whose times it has read from packets, takes them in the wrong order. Decoding gives all
# frames in the right order, in MP4 and in AVI.
#
# Output seen:
#   clip.mp4  packet times 0 4 2 1 3 8 6 5  frames 0 1 2 3 4 5 6 7
#   clip.avi  packet times 0 1 2 3 4 5 6 7  frames 0 1 2 3 4 5 6 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import av
import numpy as np

found = {}
for name in ("clip.mp4", "clip.avi"):
    with av.open(name, "w") as file:
        options = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}
        stream = file.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(24):
            image = np.full((64, 96, 3), 10 * i, np.uint8)  # the brightness tells the number
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    with av.open(name) as file:
        packets = [p for p in file.demux(video=0) if p.size]
        times = [p.dts if p.pts is None else p.pts for p in packets]
        times = [round(24 * time * packets[0].time_base) for time in times]
    with av.open(name) as file:
        frames = [round(f.to_ndarray(format="rgb24").mean() / 10) for f in file.decode(video=0)]
    start = min(times)
    found[name] = ([t - start for t in times], frames)
    print(f"{name}  packet times", *found[name][0][:8], " frames", *frames[:8])
assert found["clip.mp4"] != found["clip.avi"]
assert found["clip.mp4"][0][:8] == [0, 4, 2, 1, 3, 8, 6, 5], "MP4 stores presentation times"
assert found["clip.avi"][0][:8] == list(range(8)), "AVI: times in the order of decoding"
assert found["clip.mp4"][1] == found["clip.avi"][1] == list(range(24)), "decoding is right"
PYTHON
