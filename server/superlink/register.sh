#!/bin/sh
# Registers every site whose public key lies as NAME.pub in DIRECTORY, under that NAME. A SuperLink keeps its register
# in memory, so this runs after each of its starts, and again whenever a key was added. It never removes a site.
set -eu

if [ "$#" -ne 1 ] || [ ! -d "$1" ]; then
    echo "expected one folder with the sites' public keys; got '$*'; run $0 /etc/fedtune/sites" >&2
    exit 2
fi

# The SuperLink answers some seconds after its start. Who gives up says what the last try said.
tries=30
until said=$(flwr supernode list 2>&1); do
    tries=$((tries - 1))
    if [ "$tries" -eq 0 ]; then
        echo "$said" >&2
        exit 1
    fi
    sleep 1
done

status=0
for key in "$1"/*.pub; do
    [ -e "$key" ] || continue
    name=$(basename "$key" .pub)
    said=$(flwr supernode register --format json --name "$name" "$key" 2>&1) || true
    case $said in
        *'"success": true'*) echo "$name: registered, $(echo "$said" | grep -o '"node-id": [0-9]*' | tr -d '"')" ;;
        *'code: 23'*) echo "$name: this SuperLink has its key since its start" ;;
        *)
            echo "$name: refused: $said" >&2
            status=1
            ;;
    esac
done
exit "$status"
