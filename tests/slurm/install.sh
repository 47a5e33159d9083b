#!/bin/sh
# Installs Slurm and munge on a Debian or Ubuntu machine, if they are not there. Starts nothing.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
why=
[ "$(id -u)" = 0 ] || why="this is not root"
command -v apt-get >/dev/null || why="there is no apt-get"
if [ -n "$why" ]; then
    echo "no$missing, and Slurm cannot be installed ($why): install slurm-wlm and munge" >&2
    exit 1
fi
install() {
    apt-get -qq update && apt-get -qq install -y --no-install-recommends slurm-wlm munge
}
if ! install >/dev/null; then
    echo "apt-get could not install slurm-wlm and munge (its reasons are above)" >&2
    exit 1
fi
