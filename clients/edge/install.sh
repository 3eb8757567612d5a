#!/bin/sh
# Install a fedtune program of one file, or remove it; needs a shell and its usual commands.
#   sh install.sh [FILE] [--to FOLDER]      check FILE against SHA256SUMS beside it, and copy it: /usr/local/bin for root,
#                                           ~/.local/bin for others; without FILE: fedtune-edge for this architecture
#   sh install.sh [FILE] --service          also a systemd unit, and a user fedtune-edge who may do nothing else; as root
#   sh install.sh --uninstall [--to FOLDER] remove program, unit and unpacked files; identity, data and state stay
set -eu

refuse() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 2
}

# $1: a version of glibc, as 2.36. True if this system has it, or a newer one.
has_glibc() {
    here=$(getconf GNU_LIBC_VERSION 2>/dev/null) || return 1
    here=${here#glibc 2.}
    [ "${here%%[!0-9]*}" -ge "${1#2.}" ]
}

check() {
    [ -r "$file" ] || refuse "expected a file to install; got $file; copy it here from where install.sh is from"
    [ -r "$source/SHA256SUMS" ] || refuse "expected SHA256SUMS beside $file; got none; copy it from there, too"
    expected=''
    while read -r sum path; do
        if [ "$path" = "${file##*/}" ]; then expected=$sum; fi
    done <"$source/SHA256SUMS"
    [ -n "$expected" ] || refuse "expected ${file##*/} in $source/SHA256SUMS; got no line of it; copy both anew"
    command -v sha256sum >/dev/null || refuse "expected the command sha256sum; got none on PATH; install coreutils"
    actual=$(sha256sum <"$file")
    [ "${actual%% *}" = "$expected" ] ||
        refuse "expected the SHA-256 $expected of ${file##*/}; got ${actual%% *}; it is damaged or another: copy it anew"
    case ${file##*/} in
        *-"$machine") ;;
        *) refuse "expected a file for $machine; got ${file##*/}; take the one whose name ends in -$machine" ;;
    esac
    glibc=$(head -n 20 "$file" | grep -a '^glibc=2\.[0-9]*$') || :
    has_glibc "${glibc#glibc=}" ||
        refuse "expected glibc ${glibc#glibc=} or newer; got $(getconf GNU_LIBC_VERSION 2>/dev/null || echo none); \
take a file that was built for an older system"
}

copy() {
    mkdir -p "$to" && [ -w "$to" ] || refuse "expected to write to $to; got a folder that is not yours; give --to FOLDER"
    # A copy under another name, then a rename: a running program keeps its file, and half a file is never started.
    cp "$file" "$to/.$program.new" && chmod 755 "$to/.$program.new" && mv -f "$to/.$program.new" "$to/$program" || {
        rm -f "$to/.$program.new"
        refuse "expected to copy ${file##*/} to $to; got an error, above; free some space, or give --to FOLDER"
    }
    printf 'installed %s\n' "$to/$program"
    case :$PATH: in
        *:"$to":*) ;;
        *) printf 'PATH has no %s: start it as %s, or add the folder to PATH\n' "$to" "$to/$program" ;;
    esac
}

add_service() {
    [ -r "$source/$program.service" ] || refuse "expected $source/$program.service, the unit; got none; copy it here from where install.sh is from"
    if ! id "$program" >/dev/null 2>&1; then
        useradd --system --home-dir "/var/lib/$program" --shell /usr/sbin/nologin "$program" 2>/dev/null ||
            adduser -S -D -H -h "/var/lib/$program" "$program" ||
            refuse "expected to add the user $program; got an error, above; add it by hand and start again"
    fi
    mkdir -p "$units" && sed "s|^ExecStart=[^ ]*|ExecStart=$to/$program|" "$source/$program.service" >"$unit" ||
        refuse "expected to write $unit; got an error, above"
    if command -v systemctl >/dev/null; then systemctl daemon-reload || :; fi
    printf 'wrote %s\nput site.toml, identity/ and the model into /var/lib/%s, owned by %s, then: systemctl enable --now %s\n' \
        "$unit" "$program" "$program" "$program"
}

uninstall() {
    if [ -e "$unit" ] && [ -w "$units" ]; then
        if command -v systemctl >/dev/null; then systemctl disable --now "$program" 2>/dev/null || :; fi
        rm -f "$unit"
        printf 'removed %s\n' "$unit"
    fi
    [ -e "$to/$program" ] && rm -f "$to/$program" && printf 'removed %s\n' "$to/$program"
    for home in "${FEDTUNE_HOME:-}" "${HOME:+$HOME/.local/share/fedtune}" "/var/lib/$program"; do
        for tree in "${home:-/nowhere}"/bin/*; do
            # A folder named by a digest, with this program in it: nothing else is ours to remove.
            case ${tree##*/} in *[!0-9a-f]*) continue ;; esac
            [ -e "$tree/$program" ] && [ -e "$tree/.sha256sums" ] || continue
            if ls -l /proc/[0-9]*/exe 2>/dev/null | grep -qF "$tree/"; then
                printf 'left %s: %s runs from it; end it and start this again\n' "$tree" "$program"
                continue
            fi
            rm -rf "$tree" && printf 'removed %s\n' "$tree"
        done
    done
    printf 'identity, data and state stay where they are\n'
}

source=$(cd "$(dirname "$0")" && pwd) machine=$(uname -m) program='' file='' to='' service='' remove=''
if [ "$(id -u)" = 0 ]; then to=/usr/local/bin; else to=${HOME:-}/.local/bin; fi
while [ $# -gt 0 ]; do
    case $1 in
        --to) to=${2:-} && shift && [ -n "$to" ] || refuse "expected a folder behind --to; got none" ;;
        --service) service=yes ;;
        --uninstall) remove=yes ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit 0 ;;
        -*) refuse "expected --to FOLDER, --service or --uninstall; got $1" ;;
        *) file=$1 ;;
    esac
    shift
done
if [ -z "$file" ]; then
    # The newest by name, where there are several.
    for file in "$source"/fedtune-edge-[0-9]*-"$machine"; do :; done
fi
program=${file##*/} program=${program%%-[0-9[]*}
case $to in /*) ;; *) to=$PWD/$to ;; esac
units=${FEDTUNE_UNITS:-/etc/systemd/system} unit=${FEDTUNE_UNITS:-/etc/systemd/system}/$program.service
if [ -n "$remove" ]; then
    uninstall
    exit 0
fi
if [ -n "$service" ] && [ "$(id -u)" != 0 ]; then
    refuse "expected root for --service; got $(id -un); start it as: sudo sh install.sh --service"
fi
case $file in */*) source=$(cd "${file%/*}" && pwd) ;; esac
check
copy
if [ -n "$service" ]; then
    source=$(cd "$(dirname "$0")" && pwd)
    add_service
fi
exit 0
