#!/usr/bin/env bash
# Start the API in the background: ./start_api.sh [start|stop|status]
#
# Output goes to api.log. API_HOST, API_PORT, API_TOKEN, JOBS_PATH and RETRAIN_TIME_LIMIT are read
# by api.py, from the environment or from .env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3 || command -v python) || {
    echo "error: no Python found. Run 'make setup' first" >&2
    exit 1
}

# Ask api.py's own settings, so that .env counts here too.
read -r port state < <("$python" -c '
import sys; sys.path.insert(0, "src")
from defect_detection import settings
env = settings.environment()
print(env.get("API_PORT", settings.API_PORT), env.get("JOBS_PATH", settings.JOBS_PATH))')
pid_file=$state/api.pid
mkdir -p "$state"

# The process id of the running API, empty if none runs. A PID file alone proves nothing: after
# a crash its number may belong to another program.
running() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 0
    case $(ps -p "$pid" -o command= 2>/dev/null) in
    *" api.py") echo "$pid" ;;
    esac
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
    RUNNER_TRACKING_ID='' nohup "$python" api.py >>api.log 2>&1 </dev/null &
    pid=$!
    disown "$pid"
    echo "$pid" >"$pid_file"
    for _ in $(seq 120); do
        if healthy "$pid"; then
            echo "The API is running (process $pid, port $port, output in api.log)"
            exit 0
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.5
    done
    kill "$pid" 2>/dev/null || true
    rm -f "$pid_file"
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
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$pid_file"
    echo "The API is stopped. A running retraining continues"
    ;;
status)
    pid=$(running)
    if [ -n "$pid" ] && healthy "$pid"; then
        echo "The API is running (process $pid, port $port)"
    else
        echo "The API is not running"
        exit 1
    fi
    ;;
*)
    echo "usage: ./start_api.sh [start|stop|status]" >&2
    exit 2
    ;;
esac
