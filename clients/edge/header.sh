#!/bin/sh
# @NAME@ @VERSION@ for Linux on @ARCH@: this script, and behind its last line a gzipped tar archive of the program.
# The archive is unpacked once, to $FEDTUNE_HOME/bin/DIGEST (without FEDTUNE_HOME: ~/.local/share/fedtune/bin/DIGEST), and
# the program is started from there in place of this script. Nothing is written anywhere else.
set -eu
glibc=@GLIBC@
name=@NAME@ arch=@ARCH@ digest=@DIGEST@ megabytes=@MEGABYTES@ first_byte=@FIRST_BYTE@

refuse() {
    printf '%s: %s\n' "$name" "$1" >&2
    exit 2
}

first_line() {
    printf '%s' "$1" | { read -r line || :; printf '%s' "$line"; }
}

# True if every file of an unpacked tree has the digest that it was built with.
is_whole() {
    (cd "$1" && sha256sum -c .sha256sums) >/dev/null 2>&1
}

is_running() {
    ls -l /proc/[0-9]*/exe 2>/dev/null | grep -qF "$1/"
}

# Of starts and removals that were killed: their process has gone, and nothing runs from there.
remove_leftovers() {
    for folder in "$bin"/.new-*-* "$bin"/.old-*-*; do
        [ -d "$folder" ] || continue
        if [ "${folder##*-}" != $$ ] && [ -d "/proc/${folder##*-}" ]; then continue; fi
        is_running "$folder" || rm -rf "$folder"
    done
}

remove_other_versions() {
    for folder in "$bin"/*; do
        if [ "$folder" != "$tree" ] && [ -e "$folder/$name" ] && ! is_running "$folder"; then
            mv "$folder" "$bin/.old-${folder##*/}-$$" || :
        fi
    done
    remove_leftovers
}

write_boot() {
    # Where it cannot be written, the next start verifies again.
    { printf '%s\n' "$boot" >"$1/.boot"; } 2>/dev/null || :
}

# Runs in a subshell: its umask, traps and exit are its own.
unpack() {
    for tool in tail gzip tar sha256sum mkdir mv rm ls grep sync uname; do
        command -v $tool >/dev/null 2>&1 ||
            refuse "expected the command $tool; got none on PATH; install coreutils, grep, gzip and tar, or busybox"
    done
    [ "$(uname -m)" = "$arch" ] ||
        refuse "expected a machine of architecture $arch; got $(uname -m); take the file whose name ends in it"
    file=$0
    [ -f "$file" ] || file=$(command -v -- "$0") || :
    [ -r "$file" ] || refuse "expected to read this program's own file; got $0; start it by its path"
    actual=$(tail -c +$first_byte "$file" | sha256sum)
    [ "${actual%% *}" = "$digest" ] ||
        refuse "expected an archive with the SHA-256 $digest in $file; got ${actual%% *}; it is damaged: copy it again"

    umask 077
    problem=$(mkdir -p "$bin" 2>&1 && [ -w "$bin" ]) ||
        refuse "expected to write to $bin; got $(first_line "${problem:-a folder or disk that is read-only}"); \
set FEDTUNE_HOME to a folder of yours"
    new=$bin/.new-$digest-$$
    trap 'rm -rf "$new"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    problem=$({ mkdir "$new" && tail -c +$first_byte "$file" | gzip -dc | tar -xf - -C "$new"; } 2>&1) && is_whole "$new" ||
        refuse "expected to unpack $megabytes MB to $bin; got $(first_line "${problem:-files that are not whole}"); \
free some space, or set FEDTUNE_HOME to a folder on another disk"
    # By doing it: a file system that runs nothing, and a system that is too old, show themselves in no other way.
    problem=$("$new/$name" version 2>&1 >/dev/null) || case $problem in
        *GLIBC*) refuse "expected glibc $glibc or newer; got an older one; take a file that was built for this system" ;;
        *ermission*) refuse "expected a file system that runs programs; got noexec at $bin; set FEDTUNE_HOME to another" ;;
        *) refuse "expected a program that runs on this system; got $(first_line "$problem"); take a file built for it" ;;
    esac
    write_boot "$new"
    sync

    # Only a whole tree gets the name; where another start was quicker, its tree stays.
    if [ -d "$tree" ] && ! is_whole "$tree"; then mv "$tree" "$bin/.old-$digest-$$" || :; fi
    [ -d "$tree" ] || mv "$new" "$tree" 2>/dev/null || :
    rm -rf "$tree/${new##*/}"  # where the other one came between these two lines
    sync
    remove_other_versions
}

home=${FEDTUNE_HOME:-${HOME:+$HOME/.local/share/fedtune}}
case $home in
    "") refuse "expected a folder for the program's files; got neither FEDTUNE_HOME nor HOME; set one of them" ;;
    /*) ;;
    *) home=$PWD/$home ;;
esac
bin=$home/bin tree=$home/bin/$digest boot='' verified=''
{ read -r boot </proc/sys/kernel/random/boot_id; } 2>/dev/null || :
if [ -x "$tree/$name" ]; then
    { read -r verified <"$tree/.boot"; } 2>/dev/null || :
    # Once after each boot: power may have failed before all of it lay on the disk.
    if [ -z "$boot" ] || [ "$verified" != "$boot" ]; then
        if is_whole "$tree"; then write_boot "$tree"; else (unpack "$@") || exit $?; fi
    fi
    remove_leftovers
else
    (unpack "$@") || exit $?
fi
exec "$tree/$name" "$@"
exit 2
