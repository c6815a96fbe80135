{{- define "postgresql.fullname" -}}
{{- printf "%s-postgresql" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "postgresql.secretName" -}}
{{- default (include "postgresql.fullname" .) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "postgresql.image" -}}
{{- with (default dict .Values.global).imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "postgresql.selector" -}}
app.kubernetes.io/name: postgresql
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "postgresql.labels" -}}
{{ include "postgresql.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The labels of the pods that write a backup. */}}
{{- define "postgresql.backupSelector" -}}
app.kubernetes.io/name: postgresql-backup
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Checks of kube-score that a workload is not to be held to, each with its reason. */}}
{{- define "postgresql.answers" -}}
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
