#!/bin/sh
# Writes a .prom file: run it from cron or at the end of a backup, and give the program
# --file 'cron=/var/lib/metrics/*.prom'. Another folder is its argument.
set -eu
file=${1:-/var/lib/metrics}/backup.prom

# Written beside the file and renamed, so that nobody reads half of it. The name that it has
# before does not match *.prom.
cat >"$file.new" <<METRICS
# HELP backup_last_success_timestamp_seconds When the last backup was complete.
# TYPE backup_last_success_timestamp_seconds gauge
backup_last_success_timestamp_seconds{target="nas"} $(date +%s)
METRICS
chmod 0644 "$file.new"
mv "$file.new" "$file"
