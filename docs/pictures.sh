#!/bin/sh
# Make the pictures of README.md and docs/manipulations.md with the models of a finished run: docs/pictures.sh [CONFIG]
set -eu
cd "$(dirname "$0")/.."
config=${1:-configs/quickstart.yaml}
out=docs/images
unclip=.venv/bin/unclip
mkdir -p "$out"

$unclip generate "$config" "a white ring on a red background" --seed 1 -o "$out/ring.png"
$unclip generate "$config" "a cyan square on a magenta background" --seed 2 -o "$out/square.png"
$unclip generate "$config" "a yellow triangle on a blue background" -n 6 --grid -o "$out/generate.png"
$unclip vary "$config" "$out/ring.png" -n 6 --grid -o "$out/vary.png"
$unclip interpolate "$config" "$out/ring.png" "$out/square.png" -n 6 --grid -o "$out/interpolate.png"
$unclip interpolate "$config" "$out/ring.png" "$out/square.png" -n 13 -o "$out/interpolate.gif"
$unclip edit "$config" "$out/ring.png" --to "a red circle on a blue background" \
    --from "a white ring on a red background" --theta 0.6 -n 6 --grid -o "$out/edit.png"
$unclip invert "$config" "$out/ring.png" -o "$out/invert.png"
$unclip probe "$config" "$out/ring.png" --components 0,1,2,4,8,16 --grid -o "$out/probe.png"
.venv/bin/python -c "
from PIL import Image
mask = Image.new('L', (64, 64), 255)
mask.paste(0, (32, 0, 64, 64))
mask.save('$out/mask.png')"
$unclip edit "$config" "$out/ring.png" --mask "$out/mask.png" --to "a white ring on a red background" -n 6 --grid \
    -o "$out/inpaint.png"
$unclip edit "$config" "$out/square.png" --zoom 1.6 -n 6 --grid -o "$out/outpaint.png"
.venv/bin/python -c "
import sys
from pathlib import Path
from flows.artifacts import sample_sheet
from stages.config import load_config
from stages.manifest import Manifest
root = load_config(sys.argv[1]).root
manifest = max(Path(root, 'generate').glob('*/manifest.json'), key=lambda path: path.stat().st_mtime)
Path('$out/generated.png').write_bytes(sample_sheet(Manifest.read_uri(root, str(manifest)), root))" "$config"
