#!/bin/sh
# Makes a federation of three institutions on this machine: setup.sh [FOLDER]. Every key stays in its own folder, as it would
# on machines of their own; the fingerprints that people would read out to each other are compared here by this script.
set -eu
folder=${1:-federation}
fedtune=${FEDTUNE:-fedtune}
if [ -e "$folder" ]; then
    echo "setup.sh: expected a new folder; $folder exists; remove it or name another" >&2
    exit 2
fi
mkdir -p "$folder"
cd "$folder"

"$fedtune" ca init ca --federation example
# The data of the embedded demo: packages of this Python's own library; every site gets two or three of them.
"$fedtune" demo --embedded --write demo.toml >/dev/null

enrol() { # name, organisation, further options of the request
    name=$1 org=$2
    shift 2
    "$fedtune" enroll request --name "$name" --org "$org" --identity "$name/identity" --out "$name.request.json" "$@" |
        tee "$name.said"
    read_out=$(sed -n 's/^fingerprint.*: //p' "$name.said")
    "$fedtune" enroll sign "$name.request.json" --fingerprint "$read_out" --out "$name.bundle.json"
    "$fedtune" enroll accept "$name.bundle.json" --identity "$name/identity"
    rm "$name.said"
}
enrol server consortium --role coordinator --host localhost
for site in a b c; do
    enrol "site-$site" "hospital-$site"
done
"$fedtune" roster install ca/roster --identity server/identity

cat >server/recipe.toml <<'TOML'
# What the three sites train together. Ranks differ; the sum is exact all the same.
name = "example"
[model]
base = "embedded"
[adapter]
rank = 8
targets = ["q_proj", "v_proj"]
[method]
name = "flora"
[client]
steps = 10
batch = 4
learning_rate = 3e-3
[rounds]
count = 3
min_clients = 3
[[override]]
clients = ["site-c"]
rank = 2
TOML
cat >server/server.toml <<'TOML'
[link]
listen = "127.0.0.1:9000"
TOML

files=$(ls data/*.jsonl)
place=0
for site in a b c; do
    count=0
    : >"site-$site/train.jsonl"
    for file in $files; do
        if [ $((count % 3)) -eq $place ]; then cat "$file" >>"site-$site/train.jsonl"; fi
        count=$((count + 1))
    done
    place=$((place + 1))
    cat >"site-$site/site.toml" <<TOML
name = "site-$site"
[link]
address = "localhost:9000"
[policy]
methods = ["flora"]
max_rank = 16
min_cohort = 3
[model]
base = "embedded"
[adapter]
targets = ["q_proj", "v_proj"]
[data]
source = "train.jsonl"
max_tokens = 128
TOML
done
echo
echo "made $folder; now, each in a terminal of its own and in $folder:"
echo "  $fedtune serve server/recipe.toml --config server/server.toml"
for site in a b c; do echo "  $fedtune join site-$site/site.toml"; done
echo "or all of them at once: run.sh $folder"
