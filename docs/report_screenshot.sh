#!/bin/sh
# Takes docs/report.png of the report.html in a run's folder: docs/report_screenshot.sh RUN_FOLDER
# The browser is `chromium`, or what CHROMIUM names; HEIGHT is in pixels.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 RUN_FOLDER" >&2; exit 2; }
page=$(cd "$1" && pwd)/report.html
[ -f "$page" ] || { echo "$0: no $page" >&2; exit 1; }
picture=$(cd "$(dirname "$0")" && pwd)/report.png
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --disable-background-networking \
	--disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$profile" \
	--window-size="1200,${HEIGHT:-1600}" --screenshot="$picture" "file://$page"
[ -f "$picture" ] || { echo "$0: the browser wrote no picture" >&2; exit 1; }
