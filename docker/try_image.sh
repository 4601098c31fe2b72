#!/usr/bin/env bash
# Builds the images without a daemon, on a base image made here: trains digits in the first one with two ranks as an
# unprivileged user, and asks the one that serves for a prediction. Needs root, port 8000, buildah and debootstrap (Debian:
# apt-get install --no-install-recommends buildah debootstrap).
#
# Variables:
#   FOLDER         folder of the base, images and containers (default: a temporary folder, removed at the end)
#   TORCH_INDEX    where pip finds torch, as in the Dockerfile
#   BUILD_OPTIONS  more options of `buildah bud`, like -v FILE:/etc/pip.conf:ro if pip needs a configuration
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
if [[ -z ${FOLDER:-} ]]; then
    FOLDER=$(mktemp -d)
    trap 'rm -rf "$FOLDER"' EXIT
fi
mkdir -p "$FOLDER"
tool() {
    local command=$1
    shift
    buildah --storage-driver vfs --root "$FOLDER/storage" --runroot "$FOLDER/state" "$command" "$@"
}

# --- the base: a minimal Debian with Python, without a registry --------------------------------------------------------
if [[ ! -e $FOLDER/base.made ]]; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$FOLDER/base" >"$FOLDER/base.log"
    base=$(tool from scratch)
    tool add --quiet "$base" "$FOLDER/base" / >/dev/null
    tool config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
    tool commit --quiet --rm "$base" localhost/base >/dev/null
    rm -rf "$FOLDER/base"
    touch "$FOLDER/base.made"
fi

# --- the images --------------------------------------------------------------------------------------------------------
read -ra options <<<"${BUILD_OPTIONS:-}"
if [[ -n ${TORCH_INDEX:-} ]]; then
    options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
fi
build() {
    tool bud --isolation chroot --format docker --build-arg BASE=localhost/base -f "$root/docker/Dockerfile" \
        -t "$@" "${options[@]}" "$root"
}
build distrain:try
build distrain:try-serve --target serve
container=$(tool from localhost/distrain:try)
# From the first container to the second, whose users have the same number. Not /runs, which is a volume of both images.
runs=$FOLDER/runs
rm -rf "$runs"
install --directory --owner=1000 --group=1000 "$runs"

# --- a training; the health check must succeed while it runs and fail afterwards ----------------------------------------
# shellcheck disable=SC2016  # expanded inside
tool run --isolation chroot -v "$runs:/mnt/runs" "$container" -- sh -eu -c '
    test "$(id -u)" = 1000
    if touch /app/mine 2>/dev/null; then echo "the unprivileged user can write to /app" >&2; exit 1; fi
    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 /app/launch/train.py strategy=ddp run_dir=/runs/try &
    training=$!
    trap "kill $training 2>/dev/null || true" EXIT
    tries=0
    until python3 /app/healthcheck.py; do
        tries=$((tries + 1))
        test "$tries" -lt 60
        sleep 1
    done
    wait "$training"
    test "$(python3 /app/healthcheck.py)" = "no rank runs"
    python3 -c "
import json
summary = json.load(open(\"/runs/try/summary.json\"))
assert summary[\"world_size\"] == 2 and summary[\"test_accuracy\"] >= 0.97, summary
print(\"the image trains digits as user 1000: world_size\", summary[\"world_size\"], \"test_accuracy\", round(summary[\"test_accuracy\"], 4))
"
    cp -r /runs/try /mnt/runs
'
tool rm "$container" >/dev/null

# --- a server; it answers for an image and ends with exit code 0 when it is asked to ------------------------------------
container=$(tool from localhost/distrain:try-serve)
entrypoint=$(tool inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")
# shellcheck disable=SC2016  # expanded inside
tool run --isolation chroot -v "$runs:/mnt/runs:ro" "$container" -- sh -eu -c '
    test "$(id -u)" = 1000
    '"$entrypoint"' run=/mnt/runs/try &
    server=$!
    trap "kill $server 2>/dev/null || true" EXIT
    python3 -c "
import io, json, time, urllib.request
from PIL import Image
address = \"http://127.0.0.1:8000\"
for attempt in range(240):
    try:
        assert json.load(urllib.request.urlopen(address + \"/health\")) == {\"status\": \"ok\"}
        break
    except OSError:
        time.sleep(1)
image = io.BytesIO()
Image.new(\"L\", (8, 8), 255).save(image, \"PNG\")
request = urllib.request.Request(address + \"/predict\", image.getvalue(), {\"Content-Type\": \"image/png\"})
print(\"the image that serves answers as user 1000:\", json.load(urllib.request.urlopen(request)))
"
    kill -TERM "$server"
    wait "$server"
'
tool rm "$container" >/dev/null
tool images
