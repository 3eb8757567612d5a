#!/bin/sh
# Serves a recipe, or goes on with its run where there is one: serve.sh RECIPE RUN SERVER.toml
set -eu
recipe=$1 run=$2 config=$3
if [ -f "$run/recipe.toml" ]; then
    exec fedtune serve --resume "$run" --config "$config" --log json
fi
exec fedtune serve "$recipe" --out "$run" --config "$config" --log json
