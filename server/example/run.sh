#!/bin/sh
# Runs a federation that setup.sh has made: server and three sites, each a process of its own; Ctrl-C ends them all.
set -eu
folder=${1:-federation}
fedtune=${FEDTUNE:-fedtune}
cd "$folder"
processes=""
trap 'kill $processes 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT TERM
if [ -f runs/example/recipe.toml ]; then
    "$fedtune" serve --resume runs/example --config server/server.toml &
else
    "$fedtune" serve server/recipe.toml --config server/server.toml &
fi
server=$!
processes=$server
for site in a b c; do
    "$fedtune" join "site-$site/site.toml" 2>"site-$site/log" &
    processes="$processes $!"
done
wait "$server"
"$fedtune" status runs/example
