{{/* How many pods of the API there may be. Takes root. */}}
{{- define "taskqueue.mostApis" -}}
{{- with .Values.api -}}
{{- if .autoscaling.enabled }}{{ int .autoscaling.maxReplicas }}{{ else }}{{ int .replicas }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* How many pods of a pool there may be. Takes its settings. */}}
{{- define "taskqueue.mostWorkers" -}}
{{- if eq .autoscaling.by "none" }}{{ int .replicas }}{{ else }}{{ int .autoscaling.maxReplicas }}{{ end -}}
{{- end -}}

{{/* The name of what scales a pool. KEDA puts `keda-hpa-` before it, and the whole must not pass 63 characters.
     Takes root and pool. */}}
{{- define "taskqueue.scalerName" -}}
{{- printf "%s-%s" (include "taskqueue.fullname" .root | trunc 38 | trimSuffix "-") .pool -}}
{{- end -}}

{{/* The pools that KEDA scales, as a list with spaces between them. Takes root. */}}
{{- define "taskqueue.kedaPools" -}}
{{- $pools := list -}}
{{- range $name, $pool := (include "taskqueue.pools" . | fromJson) -}}
{{- if eq $pool.autoscaling.by "keda" -}}{{- $pools = append $pools $name -}}{{- end -}}
{{- end -}}
{{- join " " $pools -}}
{{- end -}}

{{/* What stands quoted in a URL, as it is. */}}
{{- define "taskqueue.unquoted" -}}
{{- (urlParse (printf "http://nowhere/%s" .)).path | trimPrefix "/" -}}
{{- end -}}

{{/* Where Redis is for KEDA, as JSON: address, tls, databaseIndex, and the parameters that come from a Secret.
     KEDA takes no URL, so one that was given is taken apart. Takes root. */}}
{{- define "taskqueue.kedaRedis" -}}
{{- $found := dict "tls" false "databaseIndex" 0 "secrets" list -}}
{{- if .Values.redis.enabled -}}
{{- with .Subcharts.redis -}}
{{- $_ := set $found "address" (printf "%s.%s.svc.%s:6379" (include "redis.fullname" .) $.Release.Namespace $.Values.clusterDomain) -}}
{{- $_ := set $found "secrets" (list (dict "parameter" "password" "name" (include "redis.secretName" .) "key" .Values.auth.key)) -}}
{{- end -}}
{{- else if .Values.externalRedis.url -}}
{{- $url := urlParse .Values.externalRedis.url -}}
{{- $host := $url.host -}}
{{- if not (regexMatch ":[0-9]+$" $host) -}}{{- $host = printf "%s:6379" $host -}}{{- end -}}
{{- $_ := set $found "address" $host -}}
{{- $_ := set $found "tls" (eq $url.scheme "rediss") -}}
{{- $_ := set $found "databaseIndex" (trimPrefix "/" $url.path | default "0" | int) -}}
{{- $secret := printf "%s-external" (include "taskqueue.fullname" .) -}}
{{- $user := splitn ":" 2 $url.userinfo -}}
{{- if $user._0 -}}
{{- $_ := set $found "secrets" (append $found.secrets (dict "parameter" "username" "name" $secret "key" "redis-username")) -}}
{{- $_ := set $found "username" (include "taskqueue.unquoted" $user._0) -}}
{{- end -}}
{{- if $user._1 -}}
{{- $_ := set $found "secrets" (append $found.secrets (dict "parameter" "password" "name" $secret "key" "redis-password")) -}}
{{- $_ := set $found "password" (include "taskqueue.unquoted" $user._1) -}}
{{- end -}}
{{- else -}}
{{- with .Values.externalRedis -}}
{{- $_ := set $found "address" .keda.address -}}
{{- $_ := set $found "tls" .keda.tls -}}
{{- $_ := set $found "databaseIndex" (int .keda.databaseIndex) -}}
{{- $secrets := list -}}
{{- with .keda.usernameKey -}}
{{- $secrets = append $secrets (dict "parameter" "username" "name" $.Values.externalRedis.existingSecret "key" .) -}}
{{- end -}}
{{- with .keda.passwordKey -}}
{{- $secrets = append $secrets (dict "parameter" "password" "name" $.Values.externalRedis.existingSecret "key" .) -}}
{{- end -}}
{{- $_ := set $found "secrets" $secrets -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}
