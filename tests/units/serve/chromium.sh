#!/bin/sh
# Installs the browser that the slow test of the page needs (Debian and Ubuntu; as root).
set -e
apt-get update -q
apt-get install -y -q --no-install-recommends chromium
