#!/bin/sh
# A command of the appliance: how long its certificates are good for.
echo '# HELP certs_days_left Days until the certificate expires.'
echo '# TYPE certs_days_left gauge'
echo 'certs_days_left{name="web"} 41'
echo 'certs_days_left{name="mail"} 12'
