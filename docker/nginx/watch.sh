#!/bin/sh
# Starts nginx, and keeps it told which replicas there are: Docker's name service lists the addresses of those that run.
# nginx by itself asks once, and hashes a name with several addresses as one.
set -u

addresses() {
    # Replicas with a GPU go before those without.
    for name in service-gpu service; do
        found=$(timeout 1 getent ahostsv4 "$name" | awk '{print $1}' | sort -u)
        [ -z "$found" ] || { echo "$found"; return; }
    done
}

write_replicas() {
    if [ -n "$1" ]; then
        # They are never given up: the list leaves out who is gone, and overload is no failure.
        for address in $1; do echo "server $address:8000 max_fails=0;"; done
    else
        echo "server 127.0.0.1:1 max_fails=0;"  # refuses at once
    fi >/tmp/replicas.conf.new
    mv /tmp/replicas.conf.new /tmp/replicas.conf
}

echo "listen 8080;" >/tmp/listen.conf
if [ -e /run/secrets/tls_certificate ]; then
    cat >>/tmp/listen.conf <<END
listen 8443 ssl;
ssl_certificate /run/secrets/tls_certificate;
ssl_certificate_key /run/secrets/tls_key;
ssl_protocols TLSv1.2 TLSv1.3;
END
fi
known=$(addresses)
write_replicas "$known"
nginx -g 'daemon off;' &
server=$!
trap 'kill -QUIT $server' QUIT TERM INT
while kill -0 "$server" 2>/dev/null; do
    sleep 1 &
    wait $!
    now=$(addresses)
    # A list that is empty for a moment says nothing of those we know.
    if [ -n "$now" ] && [ "$now" != "$known" ]; then
        known=$now
        write_replicas "$known"
        kill -HUP "$server" 2>/dev/null
    fi
done
wait "$server"
