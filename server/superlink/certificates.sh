#!/bin/sh
# Makes in DIRECTORY the certificates of a SuperLink and the secret that it shares with its SuperExec: an authority of
# its own, a certificate for NAME, which the sites see, and one for localhost, between the proxy and the SuperLink.
# Called again, it keeps the authority and the secret and renews both certificates.
set -eu

days=397
authority_days=3650

if [ "$#" -lt 2 ]; then
    echo "expected DIRECTORY NAME [NAME ...], NAME being what the sites call this server (fl.example.org, 10.1.2.3);" \
        "got $# argument(s); run $0 /etc/fedtune fl.example.org" >&2
    exit 2
fi
directory=$1
shift

# Addresses and names are different kinds of entry; under the wrong one a name never matches.
names=
for name in "$@"; do
    case $name in
        *[!A-Za-z0-9.:-]* | '' | -*)
            echo "expected a host name or an address; got '$name'; leave out scheme, port and wildcards" >&2
            exit 2
            ;;
    esac
    case $name in
        *:*) kind=IP ;;
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
    esac
    names=${names:+$names,}$kind:$name
done

umask 077
mkdir -p "$directory"
cd "$directory"
scratch=$(mktemp -d "$PWD/.new.XXXXXX") # on the same file system, so that what is moved out of it is whole
trap 'rm -rf "$scratch"' EXIT

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1"
}

issue() { # FILE COMMON_NAME SUBJECT_ALTERNATIVE_NAMES
    new_key "$scratch/$1.key"
    openssl req -new -key "$scratch/$1.key" -subj "/CN=$2" -out "$scratch/$1.csr"
    printf '%s\n' "basicConstraints = critical, CA:FALSE" "keyUsage = critical, digitalSignature" \
        "extendedKeyUsage = serverAuth" "subjectKeyIdentifier = hash" "authorityKeyIdentifier = keyid" \
        "subjectAltName = $3" >"$scratch/$1.ext"
    openssl x509 -req -in "$scratch/$1.csr" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
        -days "$days" -extfile "$scratch/$1.ext" -out "$scratch/$1.crt" 2>"$scratch/said" || {
        cat "$scratch/said" >&2
        exit 1
    }
    openssl verify -x509_strict -CAfile ca.crt "$scratch/$1.crt" >/dev/null
    chmod 644 "$scratch/$1.crt"
    mv "$scratch/$1.key" "$scratch/$1.crt" .
}

if [ ! -e ca.key ]; then
    if [ -e ca.crt ]; then
        echo "expected ca.key beside $directory/ca.crt; got the certificate alone; bring the key back" >&2
        exit 1
    fi
    new_key "$scratch/ca.key"
    openssl req -x509 -new -key "$scratch/ca.key" -days "$authority_days" -subj "/CN=fedtune authority of $1" \
        -addext "keyUsage = critical, keyCertSign, cRLSign" -out "$scratch/ca.crt"
    chmod 644 "$scratch/ca.crt"
    mv "$scratch/ca.crt" "$scratch/ca.key" .
fi
issue public "$1" "$names"
issue superlink localhost DNS:localhost,IP:127.0.0.1
if [ ! -e superexec.secret ]; then
    openssl rand -hex 32 >"$scratch/superexec.secret"
    mv "$scratch/superexec.secret" .
fi

echo "made for $*, valid for $days days, in $directory:"
echo "  ca.crt              for every site; tell it this fingerprint by another way:"
openssl x509 -in ca.crt -noout -fingerprint -sha256 | sed 's/^/                      /'
echo "  ca.key              belongs off this machine until the renewal"
echo "  public.*            for nginx"
echo "  superlink.*         for the SuperLink"
echo "  superexec.secret    for the SuperLink and its SuperExec"
