{{- define "redis.fullname" -}}
{{- printf "%s-redis" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "redis.secretName" -}}
{{- default (include "redis.fullname" .) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "redis.image" -}}
{{- with (default dict .Values.global).imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "redis.selector" -}}
app.kubernetes.io/name: redis
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "redis.labels" -}}
{{ include "redis.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Checks of kube-score that a workload is not to be held to, each with its reason. */}}
{{- define "redis.answers" -}}
{{- $answers := list -}}
{{- /* A digest can be set: nodes need not ask a registry at each start. */ -}}
{{- if ne .Values.image.pullPolicy "Always" }}{{ $answers = append $answers "container-image-pull-policy" }}{{ end -}}
{{- /* The official image runs as 999, and where no id is set the platform chooses one. */ -}}
{{- if lt (int (default 0 .Values.podSecurityContext.runAsUser)) 10000 -}}
{{- $answers = append $answers "container-security-context-user-group-id" -}}
{{- end -}}
{{- /* The chart around this one has a policy for it, which is off by default. */ -}}
{{- $answers = append $answers "pod-networkpolicy" -}}
kube-score/ignore: {{ join "," $answers }}
{{- end }}
