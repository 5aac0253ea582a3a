#!/usr/bin/env bash
# Start the API in the background: ./start_api.sh [start|stop|status]
#
# Output goes to api.log. API_HOST, API_PORT, API_TOKEN, JOBS_PATH and RETRAIN_TIME_LIMIT are read
# by api.py, from the environment or from .env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -x .venv/bin/python ]; then
    # Its real path: a .venv that is a link may be replaced while the API and its jobs run.
    python=$(cd .venv/bin && pwd -P)/python
else
    python=$(command -v python3 || command -v python) || {
        echo "error: no Python found. Run 'make setup' first" >&2
        exit 1
    }
fi

# Ask api.py's own settings, so that .env counts here too.
settings=$("$python" -c '
import sys; sys.path.insert(0, "src")
from defect_detection import cli, settings
def main():
    env = settings.environment()
    print(env.get("API_PORT", settings.API_PORT))
    print(env.get("JOBS_PATH", settings.JOBS_PATH))
cli.run(main)')
{ IFS= read -r port; IFS= read -r state; } <<<"$settings"
case $port in
*[!0-9]*)
    echo "error: API_PORT is '$port', expected a number from 1 to 65535" >&2
    exit 1
    ;;
esac
pid_file=$state/api.pid
mkdir -p "$state"

# The process id of the running API, empty if none runs. api.py locks its PID file as long as it
# lives; a number in the file alone proves nothing, as it may belong to another program by now. An
# API of a former version locks nothing, so its /health must confirm the number.
running() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 0
    if locked || healthy "$pid"; then echo "$pid"; fi
}

locked() {
    "$python" - "$pid_file" <<'PY'
import fcntl, sys
with open(sys.argv[1]) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(0)
sys.exit(1)
PY
}

healthy() {
    "$python" - "$port" "$1" <<'PY' 2>/dev/null
import json, sys, urllib.request
port, pid = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(f"http://127.0.0.1:{port}/health", timeout=15) as answer:
    sys.exit(json.load(answer)["pid"] != int(pid))
PY
}

case ${1:-start} in
start)
    pid=$(running)
    if [ -n "$pid" ]; then
        echo "The API is already running (process $pid, port $port)"
        exit 0
    fi
    # At the end of a job the GitHub runner ends every process whose environment holds the job's
    # RUNNER_TRACKING_ID; without it the API lives on.
    RUNNER_TRACKING_ID='' nohup "$python" api.py --log "$PWD/api.log" --pid-file "$pid_file" \
        >>api.log 2>&1 </dev/null &
    pid=$!
    disown "$pid"
    for _ in $(seq 120); do
        if healthy "$pid"; then
            echo "The API is running (process $pid, port $port, output in api.log)"
            exit 0
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.5
    done
    kill "$pid" 2>/dev/null || true
    echo "error: the API did not start. The end of api.log:" >&2
    tail -n 20 api.log >&2
    exit 1
    ;;
stop)
    pid=$(running)
    if [ -z "$pid" ]; then
        echo "The API is not running"
        exit 0
    fi
    kill "$pid"
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    [ "$(running)" != "$pid" ] || kill -9 "$pid" 2>/dev/null || true
    echo "The API is stopped. A running retraining continues"
    ;;
status)
    pid=$(running)
    if [ -z "$pid" ]; then
        echo "The API is not running"
        exit 1
    elif ! healthy "$pid"; then
        echo "The API (process $pid) does not answer on port $port"
        exit 1
    fi
    echo "The API is running (process $pid, port $port)"
    ;;
*)
    echo "usage: ./start_api.sh [start|stop|status]" >&2
    exit 2
    ;;
esac
